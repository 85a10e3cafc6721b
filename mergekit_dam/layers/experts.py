"""The fit of experts, one after the other: each to the teacher's own expert on the same tokens.

1. Both parts run up to the experts. The merged router decides which expert sees which token.
2. The linears of each expert are fitted in forward order. A linear's target is its output in the
   teacher's own expert, for the same token of the teacher's stream. The inputs of the next linear
   are computed through the fitted one.
3. An expert to which too few tokens are routed keeps the average, and the report says so.

Only one linear of one expert is fitted at a time: there are as many Gram matrices as domains.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.choices import ExpertFeed
from mergekit_dam.coefficients.correction import Correction
from mergekit_dam.coefficients.merge import expert_axis
from mergekit_dam.coefficients.tensors import FittedTensor, TensorReport, TensorSources
from mergekit_dam.fitting.evidence import Evidence, Pool
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments, LinearTokens
from mergekit_dam.fitting.solver import precision
from mergekit_dam.layers.expert_tokens import RoutedStream, observe
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.experts import FusedLinear, run_expert
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.share import Split, judging_split

FEWEST = 64
"""Calibration tokens that must be routed to an expert before it is fitted.

With fewer, fits were worse than the average on unseen text, for experts 64 wide as for experts
768 wide: the ridge holds the directions that few tokens do not determine. Held-out text does not
help, because a handful of tokens per expert does not tell a good fit from a bad one.
"""


def too_few(tokens: float, fed: ExpertFeed) -> bool:
    """Whether an expert keeps the average because too few tokens were sent to it.

    Args:
        tokens: calibration tokens of the fit that were sent to it.
        fed: which tokens it is fitted to.
    """
    return fed == "routed" and tokens < FEWEST


@dataclass
class _Fused:
    """The results of one linear, expert by expert.

    Attributes:
        sources: sources of the fused weight.
        linear: the linear that is fitted.
        rows: coefficients `[sources, columns]` of each expert, on the host.
        kept: experts that keep the average, by reason.
        losses: six sums over the experts: the loss at the start, the loss after the fit, and the
            energy that divides both; each on the data of the fit, then on held-out data.
    """

    sources: TensorSources
    linear: FusedLinear
    rows: list[Tensor] = field(default_factory=list)
    kept: dict[str, list[int]] = field(default_factory=dict)
    corrections: dict[int, Correction | None] = field(default_factory=dict)
    losses: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))

    @property
    def columns(self) -> int:
        return self.sources.tensors[0].shape[self.linear.axis]

    def keep(self, expert: int, reason: str) -> None:
        """Record that an expert keeps the average."""
        self.rows.append(self.sources.start().expand(-1, self.columns))
        self.kept.setdefault(reason, []).append(expert)

    def add(self, expert: int, fitted: FittedTensor, evidence: Evidence[LinearMoments]) -> None:
        """Record an expert's fit, or the reason why it keeps the average."""
        report = fitted.report
        self.rows.append(fitted.coefficients.cpu().expand(-1, self.columns))
        if report.outcome != "fitted":
            self.kept.setdefault(report.outcome, []).append(expert)
        start = (report.loss_start, report.held_out_start)
        ended = (report.loss_fitted, report.held_out_fitted)
        energies = [
            sum(sums.scale * float(sums.energy) for sums in every) / evidence.total
            for every in (evidence.fit, evidence.held_out)
        ]
        losses = [*start, *(ended if report.outcome == "fitted" else start)]
        values = [*(math.nan if loss is None else loss for loss in losses), *energies]
        self.losses += torch.tensor(values, dtype=torch.float64)
        self.corrections[expert] = fitted.correction

    def settled(self, seconds: float, device: torch.device) -> FittedTensor:
        """The whole fused tensor, merged, with its report."""
        linear, sources = self.linear, self.sources
        fitted = len(self.rows) - sum(map(len, self.kept.values()))
        coefficients = torch.cat(self.rows, dim=1) if fitted else sources.start()
        reasons = list(self.kept)
        kept = reasons[0] if len(reasons) == 1 else "start kept by all experts"
        losses = [
            float(loss / energy) if energy and not loss.isnan() else None
            for loss, energy in zip(self.losses[:4], self.losses[[4, 5, 4, 5]], strict=True)
        ]
        report = TensorReport(
            sources.name,
            "experts",
            "fitted" if fitted else kept,
            loss_start=losses[0],
            held_out_start=losses[1],
            loss_fitted=losses[2],
            held_out_fitted=losses[3],
            solver={"experts": fitted},
            seconds=seconds,
            experts=self.kept,
        )
        own = (self.corrections.get(expert) for expert in range(len(self.rows)))
        correction = Correction.stacked(own)
        if correction is not None:
            report.correction.update(experts=sum(c is not None for c in self.corrections.values()))
        merged = sources.on(device).merged(coefficients, axis=linear.axis, correction=correction)
        return FittedTensor(sources, merged, coefficients, linear.axis, report, correction)


def fit_experts(walk: Walk, group: int, units: list[Unit]) -> Iterator[tuple[str, FittedTensor]]:
    """Fit the experts of a group; biases keep the average.

    Yields:
        (name relative to the part, fitted tensor) of every fused weight.
    """
    (unit,) = units
    started = time.perf_counter()
    streams = [observe(walk, group, unit, stream) for stream in walk.streams]
    fused = [
        _Fused(walk.sources[unit.parameter(linear.parameter)], linear) for linear in unit.linears
    ]
    for expert in range(fused[0].sources.tensors[0].shape[0]):
        _fit_expert(walk, unit, expert, streams, fused)
    seconds = (time.perf_counter() - started) / len(fused)
    for own in fused:
        yield unit.parameter(own.linear.parameter), own.settled(seconds, walk.device)


def _fit_expert(
    walk: Walk, unit: Unit, expert: int, streams: list[RoutedStream], fused: list[_Fused]
) -> None:
    """Fit the linears of one expert and put each into the merged part before the next."""
    few = _too_few(walk, streams, expert, walk.weight(unit).settings.experts)
    metrics = [] if few else _metrics(walk, unit, expert, streams)
    for own in fused:
        name = unit.parameter(own.linear.parameter)
        sources = own.sources.of_expert(expert).on(walk.device)
        if sources.identical:
            own.keep(expert, "identical in all models")
        elif few:
            own.keep(expert, few)
        else:
            evidence = _evidence(walk, unit, own.linear, expert, streams, metrics)
            (fitted,) = fit_linear(sources, None, evidence, axis=expert_axis(own.linear.axis))
            own.add(expert, fitted, evidence)
            walk.weights[name][expert] = fitted.merged.float()


def _too_few(walk: Walk, streams: list[RoutedStream], expert: int, fed: ExpertFeed) -> str | None:
    """The reason why an expert has too few tokens to be fitted, or None."""
    if fed == "all":
        return None
    splits: tuple[Split, ...] = ("fit", judging_split(s.share for s in walk.streams))
    fit, judging = (sum(int(s.sums[split].sent[expert]) for s in streams) for split in splits)
    if too_few(fit, fed):
        return f"start kept: fewer than {FEWEST} calibration tokens were sent to it"
    return None if judging else "start kept: no held-out token was sent to it"


def _metrics(
    walk: Walk, unit: Unit, expert: int, streams: list[RoutedStream]
) -> list[Mapping[str, Metric]]:
    """The metrics of an expert's linears, for every stream."""
    module = walk.part.root.get_submodule(unit.name)
    found: list[Mapping[str, Metric]] = []
    for routed in streams:
        gradients = walk.gradients(unit.name, routed.stream)
        plain = dict.fromkeys((linear.parameter for linear in unit.linears), PLAIN)
        found.append(plain if gradients is None else gradients.metrics(module, expert))
    return found


def _evidence(
    walk: Walk,
    unit: Unit,
    linear: FusedLinear,
    expert: int,
    streams: list[RoutedStream],
    metrics: list[Mapping[str, Metric]],
) -> Evidence[LinearMoments]:
    """The moments of one linear of one expert.

    Streams are weighted like those of a linear outside of the experts, by the summed output of
    all experts of a domain: a domain that rarely uses this expert is not weighted up for it.
    """
    sources = walk.sources[unit.parameter(linear.parameter)]
    shape = list(sources.tensors[0].shape[1:])
    columns = shape.pop(expert_axis(linear.axis))
    dtype = precision(columns * sources.settings.parametrisation.expand.shape[1])
    judged_on = judging_split(s.share for s in walk.streams)
    loss_weights = sources.settings.loss_weights
    pool: Pool[LinearMoments] = Pool(measured_alike=not walk.metrics)
    for routed, metric in zip(streams, metrics, strict=True):
        weight = loss_weights[routed.stream.source]
        sizes = {s: t.count if walk.metrics else t.energy for s, t in routed.sums.items()}
        inputs = InputMoments.zeros(columns, walk.device, dtype)
        sums = LinearMoments.zeros(shape[0], inputs, metric[linear.parameter])
        _show(walk, unit, linear, expert, routed, "fit", sums)
        inputs.add_up()
        sums.add_up()
        pool.add(sums, weight, sizes["fit"])
        if judged_on == "held_out":
            tokens = LinearTokens(metric[linear.parameter])
            _show(walk, unit, linear, expert, routed, "held_out", tokens)
            tokens.add_up()
            pool.add_held_out(tokens, weight, sizes["held_out"])
    return pool.evidence()


def _show(
    walk: Walk,
    unit: Unit,
    linear: FusedLinear,
    expert: int,
    routed: RoutedStream,
    split: Split,
    sums: LinearMoments | LinearTokens,
) -> None:
    """Add an expert's tokens to the sums: the merged linear's input, the teacher's output."""
    source, name = routed.stream.source, linear.parameter
    names = {parameter: unit.parameter(parameter) for parameter in unit.parameters}
    theirs = {
        p: walk.sources[n].of_expert(expert).teacher(source).to(walk.device, torch.float32)
        for p, n in names.items()
    }
    ours = {p: walk.weights[n][expert] for p, n in names.items()}
    teacher = walk.teachers[source].root.get_submodule(unit.name)
    merged = walk.part.root.get_submodule(unit.name)
    for sent in routed.sent(expert, split, walk.sources[names[name]].settings.experts, walk.device):
        output = run_expert(teacher, theirs, sent.teacher)[1][name].output
        x = run_expert(merged, ours, sent.merged)[1][name].input
        if isinstance(sums, LinearMoments):
            sums.inputs.add(x, sent.weight)
        sums.add(x, output, output, sent.weight)
