"""The fit of experts, one after the other: each to what the teacher's own makes of its tokens.

Who is sent where is the merged model's own routing, on the merged stream. With a token x sent to
an expert with weight g, which counts for `g f(x)` in what the experts put out together:

1. Every linear of an expert is fitted to what the teacher's own expert, given the same token in
   the teacher's stream, puts out there; errors count with the square of g.
2. What the teacher's experts still lack then, through another routing and the drift of the stream
   before them, is shared by all experts of a token alike, as targets of their last linears.

At any time the linears of one expert are worked on, and the moments of one linear exist.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_dam.anatomy import Unit
from mergekit_dam.coefficients import expert_axis
from mergekit_dam.distributed import total, totals
from mergekit_dam.experts import FusedLinear, Routing, run_expert
from mergekit_dam.fitting.gather import Seen, see, token_weights
from mergekit_dam.fitting.judge import judging_split
from mergekit_dam.fitting.linear import fit_linear
from mergekit_dam.fitting.moments import Evidence, InputMoments, LinearMoments, LinearTokens
from mergekit_dam.fitting.solver import precision
from mergekit_dam.fitting.state import Walk
from mergekit_dam.fitting.storage import Sequences
from mergekit_dam.fitting.streams import CHUNK_TOKENS, Split, Stream
from mergekit_dam.fitting.tensors import FittedTensor, TensorReport, TensorSources

import os
SHARE = os.environ.get("SHARE", "even")
FEWEST = int(os.environ.get("FEWEST", "1"))
GPOW = float(os.environ.get("GPOW", "2"))


@dataclass(frozen=True)
class Sent:
    """Tokens of one expert, some at a time.

    Attributes:
        teacher, merged: what enters it, `[tokens, hidden]`.
        missing: what its output lacks beside what the teacher's own makes of the token.
        weight: how much its errors count.
    """

    teacher: Tensor
    merged: Tensor
    missing: Tensor
    weight: Tensor


@dataclass
class Routed:
    """One stream where it enters the experts of a block.

    Attributes:
        hidden: what enters the teacher's experts, what enters the merged ones, and what the
            former lack on the latter's routing, side by side: `[sequences, length, 3 * hidden]`.
        routing: of the merged model: experts and weights `[tokens, k]`, on the host.
        counted: how much each token counts, `[tokens]`.
        energy: of what the teacher's experts put out, and the tokens' weights, by split.
    """

    stream: Stream
    hidden: Sequences
    experts: Tensor
    weights: Tensor
    counted: Tensor
    energy: dict[Split, float]
    count: dict[Split, float]

    def border(self, split: Split) -> tuple[int, int]:
        first, last = self.stream.border(split)
        length = self.stream.teacher.shape[1]
        return first * length, last * length

    def counts(self, split: Split, experts: int) -> Tensor:
        """Tokens of a split that are sent to each expert."""
        first, last = self.border(split)
        sent = self.experts[first:last].reshape(-1)
        return total(torch.bincount(sent, minlength=experts))

    def sent(self, expert: int, split: Split, device: torch.device, *, every: bool) -> Iterator[Sent]:
        """The tokens of an expert in a split: those that are sent to it, or every one."""
        length = self.stream.teacher.shape[1]
        for chunk in self.stream.chunks(split):
            tokens = slice(chunk.start * length, chunk.stop * length)
            own = (self.weights[tokens] * (self.experts[tokens] == expert)).sum(1)
            here = (self.experts[tokens] == expert).any(1)
            rows = torch.arange(len(own)) if every else here.nonzero()[:, 0]
            if not len(rows):
                continue
            hidden = self.hidden[chunk].reshape(len(own), -1)[rows].to(device)
            teacher, merged, missing = hidden.chunk(3, dim=1)
            counted = self.counted[tokens][rows]
            weight = counted if every else counted * own[rows].abs().pow(GPOW)
            missing = missing * here[rows].to(device)[:, None]
            yield Sent(teacher, merged, missing, weight.to(device))


def observe(walk: Walk, stage: int, unit: Unit, stream: Stream) -> Routed:
    """Run both parts up to and through the experts."""
    module = walk.teachers[stream.source].root.get_submodule(unit.name)
    names = [(p, unit.parameter(p)) for p in unit.parameters]
    own = {p: walk.sources[name].tensors[stream.source].float() for p, name in names}
    experts, weights, counted = [], [], []
    energies = []

    def leaving() -> Iterator[Tensor]:
        for seen in see(walk, stage, [unit], stream, None):
            routing = seen.merged.routing[unit.name]
            fed = seen.teacher.inputs[unit.name]
            wanted = seen.teacher.outputs[unit.name]
            energies.append(wanted.square().sum(-1))
            if unit.write is not None and unit.write.through is None:
                wanted = wanted + (seen.drift / unit.write.scale).reshape(wanted.shape)
            counted.append(token_weights([wanted], seen.sequences).cpu())
            alone = functional_call(module, own, (fed, routing.experts, routing.weights))
            share = routing.weights.sum(1, keepdim=True)
            missing = (wanted - alone) / share
            if SHARE == "none": missing = missing * 0
            if SHARE == "drift":
                missing = (wanted - seen.teacher.outputs[unit.name])/share
            experts.append(routing.experts.cpu())
            weights.append(routing.weights.cpu())
            rows = torch.cat([fed, routing.hidden, missing], dim=1)
            yield rows.reshape(seen.sequences, -1, rows.shape[1])

    hidden = stream.keep(leaving())
    energy = torch.cat([e.cpu() for e in energies])
    tw = torch.cat(counted)
    r = Routed(stream, hidden, torch.cat(experts), torch.cat(weights), tw, {}, {})
    for split in ("fit", "held_out"):
        a, b = r.border(split)
        r.energy[split], r.count[split] = totals([float((tw[a:b].double() * energy[a:b]).sum()), float(tw[a:b].double().sum())])
    return r


def fit_experts(walk: Walk, stage: int, units: list[Unit]) -> Iterator[tuple[str, FittedTensor]]:
    """Fit the experts of a stage."""
    started = time.perf_counter()
    (unit,) = units
    routed = [observe(walk, stage, unit, stream) for stream in walk.streams]
    count = walk.weight(unit).tensors[0].shape[0]
    every = os.environ.get("EXPERTS", "routed") == "all"
    judged_on = judging_split(walk.streams)
    sent = {split: sum(r.counts(split, count) for r in routed) for split in ("fit", "held_out")}
    out = {l.parameter: [] for l in unit.linears}
    for expert in range(count):
        few = int(sent["fit"][expert]) < FEWEST or int(sent[judged_on][expert]) < 1
        for linear in unit.linears:
            whole = walk.sources[unit.parameter(linear.parameter)]
            own = TensorSources(f"{whole.name}[{expert}]", [t[expert] for t in whole.tensors], whole.settings, whole.dtype)
            if own.identical or (few and not every):
                out[linear.parameter].append((own.start(), None, None))
                continue
            ev = evidence(walk, unit, linear, expert, routed, every)
            (fitted,) = fit_linear(own, None, ev, axis=expert_axis(linear.axis))
            en = sum(m.scale * m.energy for m in ev.fit) / ev.total, sum(m.scale * m.energy for m in ev.held_out) / ev.total
            out[linear.parameter].append((fitted.coefficients, fitted.report, en))
            walk.weights[unit.parameter(linear.parameter)][expert] = fitted.merged.float()
    for linear in unit.linears:
        whole = walk.sources[unit.parameter(linear.parameter)]
        n = whole.tensors[0].shape[linear.axis]
        rows = out[linear.parameter]
        coefs = torch.cat([c.cpu().expand(-1, n) for c, _, _ in rows], 1)
        reps = [(r, e) for _, r, e in rows if r is not None]
        agg = lambda f, i: sum(getattr(r, f) or 0 for r, _ in reps) / max(sum(e[i] for _, e in reps), 1e-30)
        nfit = sum(r.outcome == "fitted" for r, _ in reps)
        report = TensorReport(whole.name, "experts", "fitted" if nfit else "start kept", agg("loss_start", 0), agg("loss_fitted", 0), agg("held_out_start", 1), agg("held_out_fitted", 1), {"fitted": nfit}, time.perf_counter() - started)
        yield unit.parameter(linear.parameter), FittedTensor(whole, whole.merged(coefs, axis=linear.axis), coefs, linear.axis, report)


def evidence(walk, unit, linear, expert, routed, every):
    whole = walk.sources[unit.parameter(linear.parameter)]
    out, columns = whole.tensors[0][expert].shape
    if linear.axis == 1: out, columns = columns, out
    dtype = precision(columns * whole.settings.parametrisation.expand.shape[1])
    judged_on = judging_split(walk.streams)
    pooled, held = None, []
    lw = whole.settings.loss_weights
    for r in routed:
        k = r.stream.source
        def run(split, sums):
            tm, mm = (w.root.get_submodule(unit.name) for w in (walk.teachers[k], walk.part))
            tw = {p: walk.sources[unit.parameter(p)].tensors[k][expert].float() for p in unit.parameters}
            mw = {p: walk.weights[unit.parameter(p)][expert] for p in unit.parameters}
            for s in r.sent(expert, split, walk.device, every=every):
                _, theirs = run_expert(tm, tw, s.teacher)
                _, ours = run_expert(mm, mw, s.merged)
                y = theirs[linear.parameter].output
                x = ours[linear.parameter].input
                wanted = y + s.missing if linear.leaves else y
                if isinstance(sums, LinearMoments): sums.inputs.add(x, s.weight)
                sums.add(x, wanted, y, s.weight)
        m = LinearMoments.zeros(out, InputMoments.zeros(columns, walk.device, dtype))
        run("fit", m)
        m.inputs.add_up(); m.add_up()
        f = lw[k] / max(r.energy["fit"], 1e-30)
        if pooled is None: pooled = m.scaled(f)
        else: pooled.add_scaled(m, f)
        if judged_on == "held_out":
            t = LinearTokens()
            run("held_out", t); t.add_up()
            t.scale = lw[k] / max(r.energy["held_out"], 1e-30)
            held.append(t)
    return Evidence([pooled], held or [pooled], sum(lw[r.stream.source] for r in routed))
