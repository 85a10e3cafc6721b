"""Quantised copies of a saved model, and the plain models that they stand for.

The libraries that define the formats write both: a copy as their users do, and its twin by
loading the copy and dequantising it.
"""

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

needs_bitsandbytes = [
    pytest.mark.bitsandbytes,
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
    ),
]
"""Marks of tests that need that package."""


def four_bit(model: Path, folder: Path, kind: str = "nf4", *, nested: bool = False) -> Path:
    """A copy in 4 bits of bitsandbytes.

    Args:
        kind: nf4 or fp4.
        nested: whether the scales are quantised, too.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings, device_map="cpu", dtype="auto"
    )
    return _saved(loaded, folder, model)


def four_bit_twin(model: Path, folder: Path) -> Path:
    """The plain model that a copy in 4 bits stands for."""
    loaded = AutoModelForCausalLM.from_pretrained(model, device_map="cpu", dtype="auto")
    return _saved(loaded.dequantize(), folder, model, save_original_format=False)


def packed(model: Path, folder: Path, *, ignore: tuple[str, ...] = (), **weights: Any) -> Path:
    """A copy in packed integers of compressed-tensors, with scales of the largest weights.

    Args:
        ignore: modules that stay as they are.
        weights: how weights are quantised, as in the library's `QuantizationArgs`.
    """
    args = QuantizationArgs(type="int", **weights)
    scheme = {"targets": ["Linear"], "weights": args.model_dump()}
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    apply_quantization_config(loaded, config)
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):
            width = args.group_size or module.weight.shape[1]
            groups = module.weight.detach().unflatten(1, (-1, width))
            scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
            module.weight_scale.data = scale
            if not args.symmetric:
                module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(loaded)
    compressor.compress_model(loaded)
    saved = _saved(loaded, folder, model)
    compressor.update_config(str(saved))
    return saved


def packed_twin(model: Path, folder: Path) -> Path:
    """The plain model that a copy in packed integers stands for."""
    settings = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the model has settings of its own
        loaded = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=settings, dtype="auto"
        )
    return _saved(loaded, folder, model, save_original_format=False)


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of each four bits of a word, from the lowest, among the word's eight outputs."""


def awq_words(codes: Tensor) -> Tensor:
    """Codes of AWQ, 0 to 15 [inputs, outputs], in int32 [inputs, outputs / 8]."""
    places = torch.arange(0, 32, 4)
    words = (codes.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].long() << places).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def _saved(loaded: Any, folder: Path, model: Path, **options: Any) -> Path:
    """Save a model, with the tokenizer of the one that it was made from."""
    for own in (loaded.config, loaded):
        if options:  # the plain twin
            vars(own).pop("quantization_config", None)
    with torch.no_grad():
        loaded.save_pretrained(folder, **options)
    for file in model.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder
