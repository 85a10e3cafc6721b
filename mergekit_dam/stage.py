"""One stage of a merge, input, block or output, from loaded tensors to merged ones."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.anatomy import Anatomy
from mergekit_dam.decoder import Decoder
from mergekit_dam.distributed import from_first
from mergekit_dam.errors import DamError
from mergekit_dam.fitting.head import fit_head
from mergekit_dam.fitting.state import Metrics
from mergekit_dam.fitting.streams import Stream
from mergekit_dam.fitting.tensors import FittedTensor, TensorReport, TensorSources
from mergekit_dam.fitting.walk import FitHead, walk_part
from mergekit_dam.heap import give_back
from mergekit_dam.part import Part, block_part, input_part, output_part, without_tokens
from mergekit_dam.settings import RunSettings, TensorSettings
from mergekit_dam.vocabulary import Own

Loaded = Mapping[str, Mapping[Any, Tensor]]
"""Output tensor's name -> source, or `Own` of it where other rows are forced -> tensor."""

StageKind = Literal["input", "block", "output"]

T = TypeVar("T")


@dataclass(frozen=True)
class Rung:
    """One step of the search for the best coefficients, judged on held-out data.

    Attributes:
        name: what was tried.
        kept: it became the best so far.
        held_out_kl: from each model that has calibration data, in nats per token.
        mean_held_out_kl: their mean, by the models' loss weights.
        seconds: wall time.
        details: such as the number of steps.
    """

    name: str
    kept: bool
    held_out_kl: tuple[float, ...]
    mean_held_out_kl: float
    seconds: float
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor as planned.

    Attributes:
        name: of the output tensor.
        settings: how it is fitted.
        written: dtype it is written in, or None for that of the sources.
        tied_to: the tensor whose coefficients it shares, if it is the same parameter.
        renamed: what transformers' model calls it, where a checkpoint has another name for it.
    """

    name: str
    settings: TensorSettings
    written: torch.dtype | None = None
    tied_to: str | None = None
    renamed: str | None = None

    @property
    def in_model(self) -> str:
        """Its name in transformers' model."""
        return self.renamed or self.name

    def sources(
        self, tensors: Sequence[Tensor], teachers: Sequence[Tensor] | None = None
    ) -> TensorSources:
        """The plan with the loaded tensors of every source.

        Args:
            teachers: what each source's own model runs on, if that is something else.

        Raises:
            DamError: the sources' shapes differ.
        """
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise DamError(f"{self.name}: required one shape in all models, got {sorted(shapes)}")
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return TensorSources(self.name, tensors, self.settings, self.written or dtype, teachers)


def of_all(
    loaded: Mapping[ModelReference, Tensor], order: Sequence[ModelReference]
) -> list[Tensor]:
    """One tensor of every source; one that is loaded stands in for those that are not.

    What is not loaded is neither merged nor a teacher's: its coefficients are 0.
    """
    instead = next(loaded[model] for model in order if model in loaded)
    return [loaded.get(model, instead) for model in order]


@dataclass(eq=False)  # tasks that carry one are hashed: by its identity
class Record:
    """What is known of the merge so far: small, and handed from stage to stage.

    Attributes:
        coefficients: fp32 `[sources, n]` or `[sources, 1]` by output tensor.
        axes: the dimension they run along, where it is not the last.
        reports: by output tensor.
        seconds: by stage.
        rungs: of the search, where the whole model was judged.
    """

    coefficients: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    reports: dict[str, TensorReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rungs: list[Rung] = field(default_factory=list)

    def without(self, names: Collection[str]) -> "Record":
        """What is known of all other tensors."""

        def rest(known: dict[str, T]) -> dict[str, T]:
            return {name: value for name, value in known.items() if name not in names}

        return Record(rest(self.coefficients), rest(self.axes), rest(self.reports))

    def add(self, fitted: FittedTensor) -> None:
        """Record a settled tensor."""
        name = fitted.sources.name
        self.coefficients[name] = fitted.coefficients.cpu()
        self.reports[name] = fitted.report
        if fitted.axis != -1:
            self.axes[name] = fitted.axis


@dataclass
class Progress:
    """What a stage leaves behind for the next one, and the merged tensors to be written."""

    streams: list[Stream]
    record: Record
    merged: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """The decoders of a merge and what they share.

    Attributes:
        output: decoder of the merged model.
        sources: decoder of every source; the merged model's own where configurations agree.
        order: the sources.
        settings: of the fit.
        anatomies: what was found of parts that are built alike, by their printed structure.
        unknown: tokens that a source does not have, bool `[vocabulary]`; none named if it has all.
    """

    output: Decoder
    sources: tuple[Decoder, ...]
    order: tuple[ModelReference, ...]
    settings: RunSettings
    anatomies: dict[str, Anatomy] = field(default_factory=dict)
    unknown: Mapping[int, Tensor] = field(default_factory=dict)

    def examine(self, part: Part, weights: Mapping[str, Tensor], like: Tensor) -> Anatomy:
        """The anatomy of a part, examined once for all blocks built alike."""
        key = f"{part.residual} {sorted(weights)} {part.root}"
        if key not in self.anatomies:
            self.anatomies[key] = from_first(lambda: part.anatomy(weights, like))
        return self.anatomies[key]

    def move(self, device: torch.device) -> None:
        """Have all decoders run on a device."""
        for decoder in {id(d): d for d in (self.output, *self.sources)}.values():
            decoder.move(device)


@dataclass(eq=False)
class Stage:
    """The fit of the input, of one block or of the output.

    Attributes:
        kind: which part of the model.
        index: of the block.
        tensors: output tensors of the stage.
        borrowed: tensors of an earlier stage that this part runs on too (a tied head's).
    """

    models: Models
    kind: StageKind
    index: int
    tensors: Sequence[TensorPlan]
    borrowed: Sequence[TensorPlan] = ()

    @property
    def all_tensors(self) -> tuple[TensorPlan, ...]:
        """Tensors that are read for the stage: its own, and those it borrows."""
        return (*self.tensors, *self.borrowed)

    def sources_of_part(self, loaded: Loaded) -> dict[str, TensorSources]:
        """The tensors that the part runs on, by names relative to it."""
        prefix = self.part(self.models.output).prefix
        return {
            plan.in_model[len(prefix) :]: self._sources(plan, loaded)
            for plan in self.all_tensors
            if plan.tied_to is None
        }

    def _sources(self, plan: TensorPlan, loaded: Loaded) -> TensorSources:
        found, order = loaded[plan.name], self.models.order
        tensors = of_all(found, order)
        teachers = [found.get(Own(m), tensor) for m, tensor in zip(order, tensors, strict=True)]
        return plan.sources(tensors, teachers)

    @property
    def label(self) -> str:
        """For people."""
        return self.part(self.models.output).label

    def part(self, decoder: Decoder) -> Part:
        """The stage's part of a decoder."""
        if self.kind == "block":
            return block_part(decoder, self.index, self.models.settings.dtype_on(decoder.device))
        return input_part(decoder) if self.kind == "input" else output_part(decoder)

    def teacher_part(self, source: int) -> Part:
        """The stage's part of a source's own model."""
        part = self.part(self.models.sources[source])
        if self.kind != "output" or source not in self.models.unknown:
            return part
        return without_tokens(part, self.models.unknown[source])

    def run(
        self,
        loaded: Loaded,
        streams: list[Stream],
        record: Record,
        *,
        show: Callable[[str], None],
        metrics: Callable[[Anatomy], Metrics] | None = None,
    ) -> Progress:
        """Fit the stage's tensors and move the streams on.

        Args:
            loaded: tensors of every source by output tensor's name.
            streams: moved on in place.
            record: added to in place.
            show: shows a line of progress.
            metrics: finds the metrics of the stage's linears; None measures plain errors.

        Raises:
            DamError: with the stage named.
        """
        started = time.perf_counter()
        sources = {plan.name: self._sources(plan, loaded) for plan in self.tensors}
        try:
            fitted = self._fit(sources, streams, show, metrics)
        except DamError as error:
            raise error.inside(self.label) from error
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise DamError(
                f"{self.label}: the fit has no solution ({error}); either `ridge` is too small, or "
                f"a model's weights, or what it makes of its calibration text, are not finite"
            ) from error
        for tensor in fitted:
            record.add(tensor)
        merged = {tensor.sources.name: tensor.merged for tensor in fitted}
        for plan in self.tensors:
            if plan.tied_to is not None:
                tied = _tied(sources[plan.name], plan.tied_to, record)
                record.add(tied)
                merged[plan.name] = tied.merged
        give_back()
        record.seconds[self.label] = time.perf_counter() - started
        return Progress(streams, record, merged)

    def _fit(
        self,
        sources: Mapping[str, TensorSources],
        streams: list[Stream],
        show: Callable[[str], None],
        metrics: Callable[[Anatomy], Metrics] | None,
    ) -> list[FittedTensor]:
        own = [plan for plan in self.tensors if plan.tied_to is None]
        if not own:
            return []
        device = sources[own[0].name].tensors[0].device
        self.models.move(device)
        part = self.part(self.models.output)

        def progress(fitted: FittedTensor) -> None:
            report = fitted.report
            short = report.name.removeprefix(part.prefix)
            if report.held_out_start is not None and report.held_out_fitted is not None:
                short += f" {report.held_out_start:.3g} -> {report.held_out_fitted:.3g}"
            show(f"{part.label} {short}")

        show(part.label)
        return walk_part(
            part,
            [self.teacher_part(source) for source in range(len(self.models.sources))],
            {plan.in_model[len(part.prefix) :]: sources[plan.name] for plan in own},
            streams,
            examine=self.models.examine,
            progress=progress,
            head=self._head(),
            advance=self.kind != "output",
            metrics=metrics,
        )

    def _head(self) -> tuple[str, FitHead] | None:
        name = self.models.output.head_name
        if self.kind != "output" or name is None:
            return None
        return name, partial(fit_head, temperature=self.models.settings.logits.temperature)


def _tied(sources: TensorSources, tied_to: str, record: Record) -> FittedTensor:
    """A tensor that is the same parameter as an earlier one: same coefficients, same bytes."""
    coefficients = record.coefficients[tied_to]
    report = TensorReport(sources.name, "head", f"tied to {tied_to}")
    return FittedTensor(sources, sources.merged(coefficients), coefficients, -1, report)
