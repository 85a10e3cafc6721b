"""Calibration text that the models of a merge write themselves (`calibration: self`).

A model that writes is in memory as a whole, on the device of the merge. Whether it fits is known
from its configuration, before any weight is read.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mergekit_dam.calibration.messages import Chat
from mergekit_dam.calibration.mixture import divided, parse_sources
from mergekit_dam.calibration.sets import KEPT, CalibrationSet, WrittenDocument
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.calibration.synthetic import BATCH, Author, Turns, chat_turns
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.calibration.templates import NONE, ChatTemplate
from mergekit_dam.errors import CalibrationError, DamError, first_line, inside
from mergekit_dam.model.build import auto_class, build_model
from mergekit_dam.parameters import RunParameters
from mergekit_dam.request.check import Checked
from mergekit_dam.stored import written_whole
from mergekit_dam.streams.memory import free_memory_of, give_back, limit_gpu

LOGITS = 4
"""Tensors of a batch's logits in fp32 that drawing a token holds at a time."""


@dataclass(frozen=True)
class Writing:
    """What a model takes while it writes.

    Attributes:
        tokens: tokens that it writes.
        steps: passes through the model, each of which adds a token to every document of a batch.
        parameters: number of its parameters.
        kept: number of elements of the keys and values of a batch.
        logits: number of elements of the logits of a batch.
    """

    tokens: int
    steps: int
    parameters: int
    kept: int
    logits: int

    def weights(self, dtype: torch.dtype) -> int:
        """Bytes of its weights in a dtype."""
        return self.parameters * dtype.itemsize

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes in memory while it runs in a dtype."""
        logits = LOGITS * self.logits * torch.float32.itemsize
        return self.weights(dtype) + self.kept * dtype.itemsize + logits


def writings(checked: Checked, trust_remote_code: bool) -> dict[ModelReference, Writing]:
    """What the models that write their own text take, by their configurations.

    Raises:
        CalibrationError: a calibration source is wrong.
        ArchitectureError: a model cannot be built.
    """
    found = {}
    for model, text in checked.calibrations.items():
        with inside(f"calibration of {model}"):
            sources = parse_sources(text)
            counts = zip(sources, divided(sources, checked.run.samples), strict=True)
            sequences = sum(count for source, count in counts if source.kind == "self")
            if sequences:
                config = model.config(trust_remote_code)
                built = build_model(config, trust_remote_code=trust_remote_code)
                found[model] = _writing(built, sequences, checked.run.sequence_length)
    return found


def _writing(model: PreTrainedModel, sequences: int, length: int) -> Writing:
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    pairs = size * (getattr(text, "num_key_value_heads", None) or heads)
    batch = min(BATCH, sequences)
    return Writing(
        tokens=sequences * length,
        steps=-(-sequences // BATCH) * length,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kept=2 * batch * length * text.num_hidden_layers * pairs,
        logits=batch * text.vocab_size,
    )


def check_room(
    writings: Mapping[ModelReference, Writing], run: RunParameters, device: torch.device
) -> None:
    """Refuse models that do not fit into memory as a whole.

    Raises:
        DamError: The first such model, with the numbers.
    """
    if not writings:
        return
    limit_gpu(device, run.gpu_memory)
    free, dtype = free_memory_of(device), run.dtype_on(device)
    for model, needs in writings.items():
        size, weights = needs.bytes(dtype), needs.weights(dtype)
        if size > free:
            half = "" if dtype == torch.bfloat16 else ", set `forward_dtype: bfloat16`"
            raise DamError(
                f"calibration of {model}: `self` holds the whole model while it writes, which "
                f"takes {_gb(size)} ({_gb(weights)} of weights, {_gb(size - weights)} of keys, "
                f"values and logits), but {_gb(free)} of {device} are free: name a source with "
                f"text{half}, or have the text written on a larger machine and name the "
                f"`{KEPT}*.jsonl` that a merge leaves there"
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class Typist:
    """Has one model write its own calibration text.

    Attributes:
        model: the model; an adapter is merged first.
        tokenizer: its tokenizer.
        run: parameters of the merge.
        options: mergekit's options.
    """

    model: ModelReference
    tokenizer: PreTrainedTokenizerBase
    run: RunParameters
    options: MergeOptions

    def __call__(self, source: CalibrationSource, tokens: int) -> list[list[int]]:
        """Documents with at least `tokens` tokens; the same seed gives the same documents.

        Raises:
            DamError: The model cannot be loaded or cannot write.
        """
        starts = self._starts(source)  # before weights are read
        loaded = self._load()
        name = Path(str(self.model)).name
        try:
            with (
                tqdm(
                    total=tokens,
                    desc=f"{name} writes text",
                    unit="token",
                    disable=self.options.quiet or None,  # None: where there is no terminal
                ) as progress,
                torch.inference_mode(),
            ):
                author = Author(
                    loaded,
                    self.tokenizer,
                    length=self.run.sequence_length,
                    seed=self.run.random_seed,
                    progress=progress,
                )
                return author.write(tokens, starts)
        except DamError:
            raise
        except Exception as error:  # what a model's code raises
            raise CalibrationError(
                f"the model cannot write text ({type(error).__name__}: {first_line(error)}): name "
                "a source with text"
            ) from error
        finally:
            del loaded
            give_back()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _starts(self, source: CalibrationSource) -> Sequence[Turns | None]:
        path = source.chat_template
        has_template = path != NONE and bool(path or self.tokenizer.chat_template)
        if source.start == "text" or (source.start is None and not has_template):
            return (None,)
        template = ChatTemplate(self.tokenizer, path=path, model=str(self.model), tally=Tally())

        def render(messages: Sequence[Mapping[str, str]]) -> str:
            return template.render(Chat(tuple(messages)), "a chat of two turns")[0]

        turns = chat_turns(self.tokenizer, render)
        return (turns,) if source.start == "chat" else (None, turns)

    def _load(self) -> PreTrainedModel:
        options = self.options
        with tempfile.TemporaryDirectory() as folder:  # for an adapter that no cache keeps
            cache = options.lora_merge_cache or folder
            trusted, dtype = options.trust_remote_code, options.lora_merge_dtype
            return self._loaded(self.model.merged(cache, trusted, dtype))

    def _loaded(self, own: ModelReference) -> PreTrainedModel:
        options = self.options
        trusted = options.trust_remote_code
        device = torch.device(options.device or "cpu")
        transformers_logging.disable_progress_bar()  # the text has a bar of its own
        try:
            auto: Any = auto_class(own.config(trusted))
            model: PreTrainedModel = auto.from_pretrained(
                own.model.path,
                revision=own.model.revision,
                cache_dir=options.transformers_cache,
                trust_remote_code=trusted,
                dtype=self.run.dtype_on(device),
            )
        except Exception as error:  # OSError, ValueError, SafetensorError, remote code
            raise CalibrationError(
                f"the model cannot be loaded to write text ({type(error).__name__}: "
                f"{first_line(error)}): name a source with text"
            ) from error
        nn.Module.to(model.eval(), device)  # in place; transformers' `to` is untyped
        return model


def keep(
    calibration: Mapping[ModelReference, CalibrationSet], out_path: Path
) -> dict[ModelReference, str]:
    """Write what models wrote to `dam_calibration.NAME.jsonl`, one document a line.

    A merge that has these files for its calibrations gets the same tokens.

    Returns:
        The name of each model's file.
    """
    kept: dict[ModelReference, str] = {}
    for model, own in calibration.items():
        if not own.written:
            continue
        stem = Path(str(model.lora or model.model).rstrip("/")).name or "model"
        others = (f"{stem}-{number}" for number in range(2, len(calibration) + 2))
        files = (f"{KEPT}{name}.jsonl" for name in (stem, *others))
        kept[model] = next(file for file in files if file not in kept.values())
        lines = [json.dumps(_row(document), ensure_ascii=False) for document in own.written]
        with written_whole(out_path / kept[model]) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return kept


def _row(document: WrittenDocument) -> dict[str, Any]:
    """A line of a kept file; the mask says that no token is padding, whatever its id."""
    return {
        "input_ids": document.input_ids,
        "attention_mask": [1] * len(document.input_ids),
        "written_text": document.text,
    }
