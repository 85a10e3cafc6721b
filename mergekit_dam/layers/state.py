"""State of the walk through one part of the model."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.coefficients.tensors import FittedTensor, TensorSources
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.layers.expert_metrics import ExpertGradients
from mergekit_dam.model.part import Part
from mergekit_dam.model.units import Anatomy, Unit
from mergekit_dam.streams.outputs import OutputCache
from mergekit_dam.streams.share import Split
from mergekit_dam.streams.stream import Stream

OnSettled = Callable[[FittedTensor], None]
Metrics = Mapping[tuple[int, str], Metric | ExpertGradients]

RECORDED = ("linear", "norm", "experts")
"""Kinds of units that are fitted to their teachers' outputs, which are kept while there is room."""

SETTLED = ("linear", "experts")
"""Kinds of units whose merged outputs are kept, once they are fitted, while there is room."""


@dataclass
class Walk:
    """One part, its data, and the tensors that are settled so far.

    Attributes:
        part: the part of the merged model.
        teachers: the same part of each source's own model.
        sources: tensors of the part by names relative to it.
        streams: one per model with calibration data.
        anatomy: the units of the part.
        weights: current weights of the merged part, as they run.
        progress: called with every settled tensor.
        metrics: metrics of the linears' errors, by source and unit; for experts, the gradients
            that give the metrics of each expert. Empty for `S = I`.
        fitted: settled tensors, by relative name.
        head: name of the output head's unit, in the part that has it.
        temperature: temperature of the logits that the head is fitted to.
        teacher_outputs: cached outputs of the teachers' units.
        merged_outputs: cached outputs of the settled linears of the merged part.
    """

    part: Part
    teachers: Sequence[Part]
    sources: Mapping[str, TensorSources]
    streams: Sequence[Stream]
    anatomy: Anatomy
    weights: dict[str, Tensor]
    progress: OnSettled
    metrics: Metrics = field(default_factory=dict)
    fitted: dict[str, FittedTensor] = field(default_factory=dict)
    head: str | None = None
    temperature: float = 1.0
    teacher_outputs: OutputCache = field(default_factory=OutputCache)
    merged_outputs: OutputCache = field(default_factory=OutputCache)

    @property
    def device(self) -> torch.device:
        """Device on which the part runs."""
        return next(iter(self.weights.values())).device

    def settle(self, name: str, fitted: FittedTensor) -> None:
        """Put a fitted tensor into the merged part."""
        self.weights[name] = self.part.as_run(fitted.merged)
        self.skip(name, fitted)

    def skip(self, name: str, fitted: FittedTensor) -> None:
        """Record a tensor that stays as it is in the merged part."""
        self.fitted[name] = fitted
        self.progress(fitted)

    def teacher_weights(
        self, stream: Stream, *, without: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The part's weights in a stream's own model, as they run, by relative name.

        Args:
            stream: the stream whose model is asked for.
            without: names to leave out.
        """
        return {
            name: self.part.as_run(own.teacher(stream.source).to(self.device))
            for name, own in self.sources.items()
            if name not in without
        }

    def fittable(self, unit: Unit, kind: str | None = None) -> bool:
        """Whether the configuration asks to fit a unit, and coefficients can change it."""
        own = [self.sources.get(unit.parameter(p)) for p in unit.parameters]
        known = [tensor for tensor in own if tensor is not None]
        if len(known) < len(own):  # the rest belongs to another part: a tied head's bias
            return False
        settings = self.weight(unit).settings
        # A head is corrected for what enters it, also where all models have the same one.
        changed = unit.name == self.head and settings.correction != "none"
        return settings.fits(kind or unit.kind) and (
            changed or not all(tensor.identical for tensor in known)
        )

    def recorded_units(self) -> tuple[str, ...]:
        """Units whose teachers' outputs the fits will need; none if nothing is to be fitted."""
        units = [
            unit for unit in self.anatomy.units if unit.name != self.head and unit.kind != "router"
        ]
        if not any(unit.kind in RECORDED and self.fittable(unit) for unit in units):
            return ()
        return tuple(
            unit.name
            for unit in units
            if unit.write or (unit.kind in RECORDED and self.fittable(unit))
        )

    def lasting(self) -> frozenset[str]:
        """Units whose teachers' outputs are needed until the part is done.

        These are what adds to the residual stream; where a teacher runs again up to a router or
        to experts, all of them.
        """
        again = any(unit.kind in ("router", "experts") for unit in self.anatomy.units)
        return frozenset(unit.name for unit in self.anatomy.units if again or unit.write)

    def settled_linears(self, group: int) -> tuple[Unit, ...]:
        """Linears and experts of earlier groups, whose outputs will not change any more."""
        before = (unit for units in self.anatomy.groups[:group] for unit in units)
        return tuple(unit for unit in before if unit.kind in SETTLED)

    def weight(self, unit: Unit) -> TensorSources:
        """Sources of a unit's weight, where they are kept; for experts, of their first weight."""
        name = "weight" if "weight" in unit.parameters else unit.parameters[0]
        return self.sources[unit.parameter(name)]

    def bias(self, unit: Unit) -> TensorSources | None:
        """Sources of a unit's bias, on the device, if it has one."""
        own = self.sources.get(unit.parameter("bias"))
        return None if own is None else own.on(self.device)

    def weight_to_fit(self, unit: Unit) -> TensorSources:
        """Sources of a unit's weight, on the device."""
        return self.weight(unit).on(self.device)

    def metric(self, unit: str, stream: Stream) -> Metric:
        """The metric of a linear's errors on a stream's data, on the device."""
        metric = self.metrics[stream.source, unit] if self.metrics else PLAIN
        assert isinstance(metric, Metric)
        return metric.to(self.device)

    def gradients(self, unit: str, stream: Stream) -> ExpertGradients | None:
        """Gradients that give single experts' metrics on a stream's data; None for `S = I`."""
        gradients = self.metrics.get((stream.source, unit))
        assert gradients is None or isinstance(gradients, ExpertGradients)
        return gradients

    def pairs(self, stream: Stream, split: Split | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Inputs of the part, chunk by chunk: (chunk, teacher's, merged), on the device."""
        for chunk in stream.chunks(split):
            teacher = stream.teacher[chunk].to(self.device)
            yield chunk, teacher, stream.merged[chunk].to(self.device)

    def known(self, stream: Stream, chunk: slice) -> dict[str, Tensor]:
        """Cached outputs of the merged part's settled linears for a chunk, on the device."""
        return self.merged_outputs.of(stream.source, chunk, self.device)
