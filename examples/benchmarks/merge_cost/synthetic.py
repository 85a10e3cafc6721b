"""Random Llama models of any shape, written with one decoder layer in memory.

    models/shape.json           their shape; written last, so a folder that has it is complete
    models/model_0/             config, tokenizer, a file of weights for every layer
    models/model_0.jsonl        calibration text

Weights are drawn so that streams have about unit size at any width, and every model is the same
base with noise of its own. Nothing has been learned: such models say what a merge costs, not how
good it is.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks.measuring.models import Models
from examples.benchmarks.merge_cost.settings import Inputs, Shape
from examples.benchmarks.merge_cost.texts import make_tokenizer, write_text

_HEAD_DIM = 64
_POSITIONS = 2**15  # rotary: no weight depends on it
_DELTA = 0.05  # size of a model's own noise, relative to the base's weights
_MARKER = "shape.json"

Shapes = dict[str, torch.Size]


def make(shape: Shape, folder: Path, *, tokens: int) -> Inputs:
    """Models of a shape, with a tokenizer and `tokens` tokens of text for each.

    Models that are there already are used if they have the shape, and deleted otherwise.

    Args:
        folder: a folder that holds nothing else.
    """
    wanted = json.dumps(asdict(shape))
    marker = folder / _MARKER
    paths = {f"model_{index}": folder / f"model_{index}" for index in range(shape.models)}
    tokenizer = make_tokenizer(shape.vocab, seed=shape.seed)
    if not (marker.is_file() and marker.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        for path in paths.values():
            path.mkdir(parents=True)
            tokenizer.save_pretrained(path)
        write_models(shape, list(paths.values()))
        marker.write_text(wanted, encoding="utf-8")
    texts = {name: path.with_suffix(".jsonl") for name, path in paths.items()}
    for index, text in enumerate(texts.values()):
        write_text(text, tokenizer, tokens=tokens, kind=index, seed=shape.seed)
    return Inputs(
        Models({name: str(path) for name, path in paths.items()}),
        {name: str(path) for name, path in texts.items()},
    )


def llama_config(shape: Shape) -> LlamaConfig:
    """The configuration of such a model: heads of 64 features where they divide the width."""
    head_dim = next(size for size in (_HEAD_DIM, 32, 16, 8, 4, 2) if shape.hidden % size == 0)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=shape.dtype,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // head_dim,
        num_key_value_heads=shape.hidden // head_dim,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def write_models(shape: Shape, folders: list[Path]) -> None:
    """Write configuration and weights of every model, layer by layer, for all models at once."""
    config = llama_config(shape)
    parts = list(_parts(config))
    weight_map: dict[str, str] = {}
    total = 0
    generator = torch.Generator().manual_seed(shape.seed)
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        base = {name: _drawn(size, generator) for name, size in part.items()}
        for folder in folders:
            own = {name: _varied(tensor, generator) for name, tensor in base.items()}
            stored = {k: tensor.to(getattr(torch, shape.dtype)) for k, tensor in own.items()}
            save_file(stored, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for folder in folders:
        config.save_pretrained(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _parts(config: LlamaConfig) -> Iterator[Shapes]:
    """Shapes of the tensors of each file: what is before the layers, each layer, what is after."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def layer(name: str) -> str:
        return name.split(".")[2] if ".layers." in name else ""

    for _, names in groupby(shapes, key=layer):
        yield {name: shapes[name] for name in names}


def _drawn(size: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, generator=generator)
    return noise / size[-1] ** 0.5 if len(size) > 1 else 1 + 0.1 * noise


def _varied(tensor: Tensor, generator: torch.Generator) -> Tensor:
    scale = _DELTA * tensor.square().mean().sqrt()
    return tensor + scale * torch.randn(tensor.shape, generator=generator)
