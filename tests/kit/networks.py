"""Networks of models that are in memory, and the same models as one plain network with autograd.

made = make("llama", base=True)
loss, gradients = Objective(made.network(), made.coordinates, settings, boundaries)(point, batches)
logits = made.logits(made.differentiable(point), tokens)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.choices import Resident
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSpec
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.probe import hidden_size, make_decoder
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.coordinates import Coordinate, coordinates_of
from mergekit_dam.search.gradient import Batch
from mergekit_dam.sources.network import Network
from mergekit_dam.sources.readahead import Span
from mergekit_dam.sources.stage import Loaded, Models, Stage
from mergekit_dam.streams.share import Share
from mergekit_dam.streams.stream import Stream
from tests.kit.models import ARCHITECTURES, fine_tunes, make_model, parameters_of
from tests.kit.parts import hidden_of, stage_of, stages_of
from tests.kit.settings import run_settings, tensor_settings
from tests.kit.tensors import CPU, tokens_of


@dataclass
class CountedNetwork(Network):
    """A network of tensors in memory, which counts how often each stage is read."""

    reads: list[int] = field(default_factory=list)


@dataclass
class Made:
    """Sources in memory: models to merge, and last a base where there is one."""

    config: PretrainedConfig
    sources: Sequence[PreTrainedModel]
    base: int | None
    settings: TensorSettings
    run: RunParameters
    written: torch.dtype | None = None

    @property
    def merged(self) -> range:
        """Indices of the models that have data."""
        return range(len(self.sources) - (self.base is not None))

    @cached_property
    def decoder(self) -> Decoder:
        return make_decoder(self.config, CPU)

    @cached_property
    def weights(self) -> list[dict[str, Tensor]]:
        """Parameters of every source by name; a tied one goes by its first name."""
        return [parameters_of(source) for source in self.sources]

    def network(self, resident: Resident = "auto") -> CountedNetwork:
        order = tuple(ModelReference.model_validate(f"m{i}") for i in range(len(self.sources)))
        models = Models(self.decoder, (self.decoder,) * len(order), order, self.run)
        stages = []
        for kind, index in stages_of(self.decoder):
            own = [
                self._spec(n) for n in self.weights[0] if stage_of(self.decoder, n) == (kind, index)
            ]
            tied = self.tied_to if kind == "output" else None
            borrowed = [] if tied is None else [self._spec(tied)]
            stages.append(Stage(models, kind, index, own, borrowed))

        def load(number: int) -> Loaded:
            network.reads[number] += 1
            return {
                spec.name: {m: own[spec.name] for m, own in zip(order, self.weights, strict=True)}
                for spec in stages[number].all_tensors
            }

        def spans(_: int) -> tuple[Span, ...]:
            return ()  # nothing lies in a file

        network = CountedNetwork(stages, load, spans, CPU, resident, reads=[0] * len(stages))
        return network

    @property
    def tied_to(self) -> str | None:
        """The embedding that is the head too."""
        name = self.decoder.names.canonical(f"{self.decoder.head_name}.weight")
        return name if name != f"{self.decoder.head_name}.weight" else None

    def _spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.settings, self.written)

    @cached_property
    def coordinates(self) -> dict[str, Coordinate]:
        """Every tensor that is fitted."""
        network, found = self.network(), {}
        for number in range(len(network.stages)):
            opened = network.open(number)
            last = number == len(network.stages) - 1
            hidden = torch.zeros(1, 4, hidden_size(self.decoder))
            like = hidden if number else torch.zeros(1, 4, dtype=torch.long)
            head = self.decoder.head_name if last else None
            for coordinate in coordinates_of(opened, opened.anatomy(like), head):
                found[coordinate.name] = coordinate
        return found

    def average(self) -> MergeRecord:
        """The start of every tensor."""
        start = self.settings.parametrisation.starting_coefficients()
        return MergeRecord({name: start.clone() for name in self.weights[0]})

    def point(self, seed: int = 0, scale: float = 0.2) -> MergeRecord:
        """Random coefficients around the average for every fitted tensor."""
        generator = torch.Generator().manual_seed(seed)
        record = self.average()
        for name, own in self.coordinates.items():
            noise = torch.randn(len(self.sources), own.columns, generator=generator)
            record.coefficients[name] = record.coefficients[name] + scale * noise
            if own.axis != -1:
                record.axes[name] = own.axis
        return record

    # The plain network

    def differentiable(self, coefficients: Mapping[str, Tensor], axes: Mapping[str, int]) -> Any:
        """Merged weights by name, as functions of coefficients `[S, n]`, in their dtype."""
        merged = {}
        for name, rows in coefficients.items():
            sources = torch.stack([own[name] for own in self.weights]).to(rows)
            shape, axis = [len(sources), *[1] * (sources.ndim - 1)], axes.get(name, -1)
            shape[1 + axis if axis >= 0 else axis] = -1
            if sources.ndim == 4 and rows.shape[1] > 1:  # one per column of every expert
                shape[1] = sources.shape[1]
            total = (sources * rows.reshape(shape)).sum(0)
            dtype = self.written or self.weights[0][name].dtype
            if dtype != torch.float32:  # rounded as it is written; gradients pass by
                total = total + (total.float().to(dtype).to(total) - total).detach()
            merged[name] = total
        return merged

    @cached_property
    def plain(self) -> PreTrainedModel:
        """A whole model in fp64, to be run on other weights."""
        return make_model(self.config).double()

    def logits(self, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Logits fp64 of the whole model on other weights."""
        given = {name: weight.double() for name, weight in weights.items()}
        output = functional_call(self.plain, given, (tokens,), {"use_cache": False})
        logits: Tensor = output.logits
        return logits

    def last_hidden(self, source: int, tokens: Tensor) -> Tensor:
        """The output of the last block of a source's own model, fp32."""
        weights = {name: weight.double() for name, weight in self.weights[source].items()}
        return hidden_of(self.plain, weights, tokens, self.decoder).float()

    def batches(self, sequences: int = 2, weights: Sequence[float] = (1.0, 0.5)) -> list[Batch]:
        """Random sequences of every model."""
        return [
            Batch(k, weights[k % len(weights)], tokens, self.last_hidden(k, tokens))
            for k in self.merged
            for tokens in [tokens_of(k, sequences)]
        ]

    def data(self, sequences: int = 5, held_out: int = 2) -> list[Stream]:
        """Calibration data of every model: its own run to the end, the merged one at its start."""
        return [
            Stream(k, self.last_hidden(k, tokens), tokens, Share.of_all(len(tokens), held_out))
            for k in self.merged
            for tokens in [tokens_of(k, sequences)]
        ]

    def streams(self, sequences: int = 5, held_out: int = 2) -> list[Stream]:
        """The same data at the entrance of the model."""
        return [Stream.of_tokens(k, tokens_of(k, sequences), held_out) for k in self.merged]


def make(
    name: str = "llama",
    *,
    models: int = 2,
    base: bool = False,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    written: torch.dtype | None = None,
    sum_to_one: bool = True,
    run: RunParameters | None = None,
    config: PretrainedConfig | None = None,
    **settings: Any,
) -> Made:
    """Fine-tunes of one model, and that model as a base where asked for.

    Args:
        scale: size of the fine-tunes' deltas, relative to the weights.
        dtype: dtype of the sources.
        settings: changes of the `TensorSettings`.
    """
    config = config or ARCHITECTURES[name]()
    sources = fine_tunes(config, models, scale)
    if base:
        sources.append(make_model(config))
    index = models if base else None
    plain = tensor_settings(
        len(sources),
        base=index,
        sum_to_one=sum_to_one,
        ridge=1e-2,
        loss_weights=[1.0 + 0.5 * k for k in range(len(sources))],
    )
    return Made(
        config,
        [source.to(dtype) for source in sources],  # type: ignore[arg-type]
        index,
        plain.model_copy(update=settings),
        run or run_settings(),
        written,
    )


def files_under(folder: Path) -> set[str]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
