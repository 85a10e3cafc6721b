"""The flops of a run of a part and of its fit, by kind of work.

Counted are the leading terms: products of matrices, factorisations, and passes over weights or
activations. The cost of a linear's fit is declared beside it, in `fitting/costs.py`. A change of
the loops in `layers/` is a change of this file.
"""

from collections.abc import Mapping

from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.sizes import PartSize
from mergekit_dam.estimate.structure import UnitShape
from mergekit_dam.estimate.text import Text
from mergekit_dam.fitting import costs
from mergekit_dam.fitting.costs import Speed, Work
from mergekit_dam.fitting.sizes import LinearSize, MetricSize
from mergekit_dam.layers import head, head_correction, head_loss
from mergekit_dam.layers.experts import too_few

_PASSES = 4
"""Times that the element-wise operations of a part pass over the outputs of its units, about."""

LOGITS_PASSES = 12
"""Times that softmax and loss pass over the logits of model and teacher, about."""


def forward(part: PartSize, inventory: Inventory, tokens: int) -> tuple[int, int]:
    """Flops of one run of a part, and elements that its element-wise operations pass over.

    Args:
        tokens: their number, in sequences of the calibration's length.
    """
    flops = _linears(part, inventory) + attention(part, inventory)
    return tokens * flops, tokens * _elements(part)


def _linears(part: PartSize, inventory: Inventory) -> int:
    """Flops per token of a part's products with weights."""
    linears = sum(unit.product for unit in part.units)
    if part.kind == "output":  # a tied head is not among its units
        linears += 2 * inventory.hidden * inventory.vocabulary
    return linears


def run_speed(part: PartSize) -> Speed:
    """The speed that a run of a part depends on: blocks alone have a dtype of their own."""
    return "forward" if part.kind == "block" else "fp32"


def attention(part: PartSize, inventory: Inventory) -> int:
    """Flops per token of attention scores and of the values that they weigh, in whole sequences."""
    return 4 * inventory.text.length * inventory.attended if part.kind == "block" else 0


def _elements(part: PartSize) -> int:
    return _PASSES * sum(leaving(unit) for unit in part.units if unit.kind != "head")


def leaving(unit: UnitShape) -> int:
    """Features per token that a unit puts out, those inside of experts included."""
    return unit.leaves + unit.sent * sum(linear.leaves for linear in unit.linears)


def merging(part: PartSize, inventory: Inventory, times: int) -> Work:
    """Merged weights, made from those of all sources."""
    return Work({("merging", "elements"): times * inventory.sources * part.parameters})


def layer_fit(part: PartSize, inventory: Inventory, *, kept: bool, sensitivity: bool) -> Work:
    """The fit of a part, the runs of both streams through it included.

    Args:
        kept: outputs of the teachers and of fitted linears are kept while the part is fitted.
        sensitivity: errors of a block's linears are measured in metrics.
    """
    text = inventory.text
    work = merging(part, inventory, 1)
    if part.kind == "output":
        return work + _output_fit(part, inventory)
    work["converting", "elements"] += text.models * part.parameters
    work += _streams(part, inventory, kept=kept)
    if sensitivity and part.kind == "block":
        work += gradients(part, inventory, text.gradient_tokens)
    for group in part.groups:
        first = group[0]
        if first.kind == "experts" and not too_few(_tokens_each(first, text), part.experts):
            work += experts_fit(first, part, inventory, sensitivity=sensitivity)
        linears = [unit for unit in group if unit.kind in ("linear", "router")]
        if linears:
            work += costs.input_moments(linears[0].enters, text.fit_tokens, text.fit_chunks)
        for unit in linears:
            work += linear_fit(unit, part, inventory, sensitivity=sensitivity)
    work["norms and embeddings", "elements"] += sum(
        16 * text.tokens * unit.leaves for unit in part.of("norm")
    )
    return work


def _tokens_each(unit: UnitShape, text: Text) -> float:
    """Tokens of the fit that are sent to each expert, if the router sends as many to all."""
    return text.fit_tokens * unit.sent / unit.experts


def _streams(part: PartSize, inventory: Inventory, *, kept: bool) -> Work:
    """Runs of both streams: every group asks for its inputs and for the teachers' outputs.

    Where outputs are kept, linears run once and attention runs again; teachers run again up to
    routers and experts alone, whose inputs are not kept.
    """
    tokens = inventory.text.tokens
    linears = [sum(unit.product for unit in group) for group in part.groups]
    elements = [_PASSES * sum(map(leaving, group)) for group in part.groups]
    attended = attention(part, inventory)
    first = next((index for index, each in enumerate(linears) if each), len(linears))
    groups = range(len(linears))
    scores = attended * sum(index > first for index in groups)
    entering = sum(sum(elements[:index]) for index in groups)
    teachers = merged = sum(linears) + attended
    if kept:
        teachers += attended * len(part.of("router", "experts"))
        merged += scores
    else:
        teachers += scores + sum(sum(linears[: index + 1]) for index in groups)
        merged += scores + sum(sum(linears[:index]) for index in groups)
    return Work(
        {
            ("teachers", "forward"): tokens * teachers,
            ("teachers", "elements"): tokens * (sum(elements) + (0 if kept else entering)),
            ("merged stream", "forward"): tokens * merged,
            ("merged stream", "elements"): tokens * (sum(elements) + entering),
        }
    )


def linear_size(
    unit: UnitShape, part: PartSize, inventory: Inventory, *, gradient_tokens: int = 0
) -> LinearSize:
    """Sizes of the fit of one linear.

    Args:
        gradient_tokens: tokens that make up a model's metric; 0 where errors are measured plainly.
    """
    return LinearSize(
        out=unit.leaves,
        columns=unit.enters,
        unknowns=part.unknowns,
        sources=inventory.sources,
        models=inventory.text.models,
        metric=MetricSize(unit.leaves, gradient_tokens) if gradient_tokens else None,
        by_column=part.by_column,
        correction=part.correction,
        rank=min(part.correction_rank, unit.leaves, unit.enters),
    )


def linear_fit(unit: UnitShape, part: PartSize, inventory: Inventory, *, sensitivity: bool) -> Work:
    """Moments, solution, correction and judgement of one linear, without its input's moments.

    Args:
        sensitivity: errors are measured in metrics.
    """
    text = inventory.text
    tokens = text.gradient_tokens_each if sensitivity else 0
    size = linear_size(unit, part, inventory, gradient_tokens=tokens)
    # A target is the teacher's own output but for linears that write to the residual stream.
    writes = unit.kind == "linear" and unit.leaves == inventory.hidden
    squares = 0 if text.judged_apart else 2 if writes else 1
    work = costs.linear_moments(size, text.fit_tokens, text.fit_chunks, squares=squares)
    work += costs.making_metrics(size.metric, text.models)
    work += costs.judgement(size, text.tensor_judging_tokens)
    work += costs.correction(size, text.tensor_judging_tokens)
    return work + costs.solution(size)


def experts_fit(
    unit: UnitShape, part: PartSize, inventory: Inventory, *, sensitivity: bool
) -> Work:
    """The fits of all experts.

    For every linear of an expert the expert runs again, the teachers' and the merged one.
    """
    text, work = inventory.text, Work()
    experts = unit.experts if part.experts == "all" else unit.sent  # how many see one token
    expert = sum(linear.product for linear in unit.linears)
    for stream in ("teachers", "merged stream"):
        work[stream, "fp32"] = len(unit.linears) * text.tokens * experts * expert
    gradient_tokens = 0
    if sensitivity:
        # Forward, and back to the outputs of all linears, which does not pass the first.
        back = expert - unit.linears[0].product
        work["backward", "fp32"] = text.gradient_tokens * unit.sent * (expert + back)
        gradient_tokens = max(1, text.gradient_tokens_each * unit.sent // unit.experts)
    for linear in unit.linears:
        size = linear_size(linear, part, inventory, gradient_tokens=gradient_tokens)
        moments = costs.input_moments(linear.enters, experts * text.fit_tokens, 0)
        moments += costs.linear_moments(size, experts * text.fit_tokens, 0, squares=1)
        each = costs.making_metrics(size.metric, text.models) + costs.solution(size)
        each += costs.judgement(size, 0) + costs.correction(size, 0)
        # Every expert has tokens of its own in most chunks.
        each += costs.input_moments(linear.enters, 0, text.fit_chunks)
        each += costs.linear_moments(size, 0, text.fit_chunks, squares=1)
        judged = costs.judgement(size, experts * text.held_out_tokens)
        corrected = costs.correction(size, experts * text.held_out_tokens)
        judged["judging", "fp32"] += corrected["judging", "fp32"]
        del judged["merging", "elements"]  # once per expert, above
        work += moments + judged
        work += Work({key: unit.experts * count for key, count in each.items()})
    return work


def gradients(part: PartSize, inventory: Inventory, tokens: int) -> Work:
    """A run of a part, and back to what entered it; weights have no gradients."""
    flops, elements = forward(part, inventory, tokens)
    # Attention has two inputs to every product, and so twice the flops on the way back.
    back = tokens * (_linears(part, inventory) + 2 * attention(part, inventory))
    return Work(
        {("backward", run_speed(part)): flops + back, ("backward", "elements"): 2 * elements}
    ) + merging(part, inventory, 1)


def _output_fit(part: PartSize, inventory: Inventory) -> Work:
    """The norm before the head, and the head's descent where it is not tied."""
    text = inventory.text
    work = Work()
    work["norms and embeddings", "elements"] = 16 * text.tokens * inventory.hidden
    if not part.fits_head:
        return work
    corrected, rank = part.correction != "none", part.correction_rank
    work += _head_descent(part, inventory, head.column_steps(corrected))
    if corrected:
        work += _head_descent(part, inventory, head_correction.STEPS, rank)
    return work


def _head_descent(part: PartSize, inventory: Inventory, most: int, rank: int = 0) -> Work:
    """A descent of the head's coefficients, or of factors of a rank."""
    text = inventory.text
    steps = head_loss.steps_for(most, text.fit_sequences * text.length, text.length)
    looks = head_loss.LOOKS if rank else 1 + head_loss.LOOKS  # of the start, once
    weight = sum(unit.parameters for unit in part.of("head"))
    seen = looks * text.judging_tokens
    tokens = steps * text.models * min(head_loss.TOKENS, text.length)
    # Both models run; a gradient goes back to the weight, and to the factors.
    flops = 2 * weight * (2 * seen + 3 * tokens + 3 * rank * steps)
    # Every step merges the weight, turns its gradient into that of the coefficients, and converts
    # the teachers' weights.
    merged = 4 if rank else 2 * inventory.sources
    elements = steps * (merged + 2 * text.models) * weight
    elements += looks * (inventory.sources + rank) * weight
    elements += LOGITS_PASSES * inventory.vocabulary * (seen + 2 * tokens)
    return Work({("head", "fp32"): flops, ("head", "elements"): elements})


def layer_sweep(inventory: Inventory, *, kept: bool, sensitivity: bool) -> Work:
    """The fits of all parts, one after the other."""
    work = Work()
    for part in inventory.parts:
        work += layer_fit(part, inventory, kept=kept, sensitivity=sensitivity)
    return work


def total(work: Mapping[tuple[str, Speed], int]) -> int:
    """Flops of all kinds of work."""
    return sum(count for (_, speed), count in work.items() if speed != "elements")
