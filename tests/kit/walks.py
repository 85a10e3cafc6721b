"""Layer fits in this process, without mergekit: whole models, or one part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSources, TensorSpec
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.part import Part
from mergekit_dam.model.probe import input_or_output, make_decoder
from mergekit_dam.sources.stage import Models, Stage, open_stage
from mergekit_dam.streams.share import Share
from mergekit_dam.streams.stream import Stream
from tests.kit.models import ARCHITECTURES, fine_tunes
from tests.kit.parts import stage_of, stages_of
from tests.kit.settings import run_settings, tensor_settings
from tests.kit.tensors import CPU, tokens_of

Merged = tuple[dict[str, Tensor], MergeRecord, list[Stream]]


@dataclass
class Merge:
    """A merge in process, without mergekit: every stage in turn, all models in memory."""

    config: PretrainedConfig
    models: Sequence[PreTrainedModel]
    streams: list[Stream]
    settings: TensorSettings
    dtype: torch.dtype | None = None

    def run(self) -> tuple[dict[str, Tensor], MergeRecord]:
        """Merged tensors by name, and the record."""
        decoder = make_decoder(self.config, CPU)
        order = tuple(ModelReference.model_validate(f"m{i}") for i in range(len(self.models)))
        models = Models(decoder, (decoder,) * len(order), order, run_settings(0.25))
        weights = [dict(model.named_parameters()) for model in self.models]
        record, merged = MergeRecord(), dict[str, Tensor]()
        for kind, index in stages_of(decoder):
            names = [n for n in weights[0] if stage_of(decoder, n) == (kind, index)]
            plans = [TensorSpec(name, self.settings, self.dtype) for name in names]
            loaded = {
                name: {m: w[name].detach() for m, w in zip(order, weights, strict=True)}
                for name in names
            }
            stage = Stage(models, kind, index, plans)
            opened = open_stage(stage, loaded, CPU)
            result = fit_stage(opened, self.streams, record)
            merged.update(result.merged)
        return merged, record


def merge_here(
    config: PretrainedConfig,
    models: Sequence[PreTrainedModel],
    *,
    data: Mapping[int, Tensor] | None = None,
    held_out: int = 2,
    dtype: torch.dtype | None = None,
    **settings: object,
) -> Merged:
    """Merge models on random tokens, different ones each; `data` by index of the model."""
    data = {k: tokens_of(k) for k in range(len(models))} if data is None else data
    streams = [Stream.of_tokens(k, tokens, held_out) for k, tokens in data.items()]
    settings_ = tensor_settings(len(models), **settings)  # type: ignore[arg-type]
    merged, record = Merge(config, models, streams, settings_, dtype).run()
    return merged, record, streams


def alike(models: Sequence[PreTrainedModel], kind: str) -> None:
    """Give every model the first one's parameters whose name ends so."""
    with torch.no_grad():
        for model in models[1:]:
            for name, parameter in model.named_parameters():
                if name.endswith(kind):
                    parameter.copy_(models[0].get_parameter(name))


def walk_of(
    name: str,
    make: Callable[[Decoder], Part],
    entering: Tensor,
    displacement: Tensor | float,
    *,
    scale: float = 0.3,
    **settings: object,
) -> tuple[Walk, list[PreTrainedModel]]:
    """A walk at its start, through a part of two fine-tunes; the data is model 1's alone."""
    config = ARCHITECTURES[name]()
    models = fine_tunes(config, 2, scale)
    decoder = make_decoder(config, CPU)
    part = make(decoder)
    places = input_or_output(decoder, frozenset(n for n, _ in models[0].named_parameters()))
    names = [
        n
        for n, _ in models[0].named_parameters()
        if (n.startswith(part.prefix) if part.prefix else places.get(n) == part.label)
    ]
    sources = {
        n.removeprefix(part.prefix): TensorSources(
            n,
            [model.get_parameter(n).detach() for model in models],
            tensor_settings(2, **settings),  # type: ignore[arg-type]
            torch.float32,
        )
        for n in names
    }
    weights = {n: s.merged(s.start()) for n, s in sources.items()}
    stream = Stream(1, entering, entering + displacement, Share.of_all(len(entering)))
    anatomy = part.anatomy(weights, entering)
    walk = Walk(part, [part, part], sources, [stream], anatomy, weights, lambda _: None)
    return walk, models
