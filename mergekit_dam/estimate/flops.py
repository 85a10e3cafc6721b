"""What a merge computes, by kind of work and by what its speed depends on.

Counts are of the leading terms: products of matrices, factorisations, and passes over weights or
activations, which memory's speed decides. A multiplication with its addition counts as two.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch

from mergekit_dam.estimate.inventory import Inventory, PartSize, Text
from mergekit_dam.estimate.structure import UnitShape
from mergekit_dam.fitting.solver import DENSE_LIMIT, precision
from mergekit_dam.layers import head
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.descend import LOOKS
from mergekit_dam.search.sensitivity import TOKENS
from mergekit_dam.streams.stream import CHUNK_TOKENS

Speed = Literal["forward", "fp32", "fp64", "cholesky", "elements"]
"""Flops of the models' blocks, flops in a precision, flops of a factorisation in fp32, or elements
that are worked through."""

Work = Counter[tuple[str, Speed]]
"""(kind of work, what its speed depends on) -> how much of it."""

ITERATIONS = 25
"""Of conjugate gradients, about, at the tolerance of fp32."""

_PASSES = 4
"""Times that element-wise operations of a part work through what linears put out, about."""

_LOGITS_PASSES = 12
"""The same of logits, from softmax to loss, of model and teacher."""


def forward(part: PartSize, inventory: Inventory, tokens: int) -> tuple[int, int]:
    """Flops of one run of a part, and elements that its element-wise operations work through.

    Args:
        tokens: in sequences of the calibration's length.
    """
    linears = sum(unit.product for unit in part.units)
    if part.kind == "output":  # a tied head is no unit of it
        linears += 2 * inventory.hidden * inventory.vocabulary
    return tokens * (linears + attention(part, inventory)), tokens * _elements(part)


def _run(part: PartSize) -> Speed:
    """What the speed of a run of a part depends on: blocks alone have a dtype of their own."""
    return "forward" if part.kind == "block" else "fp32"


def attention(part: PartSize, inventory: Inventory) -> int:
    """Flops a token of scores and of what they weigh, in whole sequences."""
    return 4 * inventory.text.length * inventory.attended if part.kind == "block" else 0


def _elements(part: PartSize) -> int:
    return _PASSES * sum(leaving(unit) for unit in part.units if unit.kind != "head")


def leaving(unit: UnitShape) -> int:
    """Features that a unit puts out a token, those inside of experts included."""
    return unit.leaves + unit.sent * sum(linear.leaves for linear in unit.linears)


def merging(part: PartSize, inventory: Inventory, times: int) -> Work:
    """Merged weights made from those of all sources."""
    return Work({("merging", "elements"): times * inventory.sources * part.parameters})


def layer_fit(part: PartSize, inventory: Inventory, *, kept: bool, sensitivity: bool) -> Work:
    """The fit of a part, both streams on their way through it included.

    Args:
        kept: outputs of the teachers and of settled linears are kept between the stages of the fit.
        sensitivity: errors of a block's linears are measured in metrics.
    """
    text = inventory.text
    work = merging(part, inventory, 1)
    if part.kind == "output":
        return work + _output_fit(part, inventory)
    work["converting", "elements"] += text.models * part.parameters
    work += _streams(part, inventory, kept=kept)
    if sensitivity and part.kind == "block":
        work += gradients(part, inventory, text.first_tokens(TOKENS))
    for group in part.groups:
        if group[0].kind == "experts":
            work += experts_fit(group[0], part.unknowns, inventory, sensitivity=sensitivity)
        linears = [unit for unit in group if unit.kind in ("linear", "router")]
        if linears:
            columns = linears[0].enters
            work["Gram matrices", "fp32"] += 2 * text.fit_tokens * columns**2
            work["Gram matrices", "elements"] += _chunks(text) * columns**2
        for unit in linears:
            work += linear_fit(unit, part.unknowns, inventory, sensitivity=sensitivity)
    work["norms and embeddings", "elements"] += sum(
        16 * text.tokens * unit.leaves for unit in part.of("norm")
    )
    return work


def _streams(part: PartSize, inventory: Inventory, *, kept: bool) -> Work:
    """Both streams' runs: every stage of the fit asks what enters it, and what teachers put out.

    Where outputs are kept, linears run once, and teachers altogether; attention runs again.
    """
    tokens = inventory.text.tokens
    linears = [sum(unit.product for unit in group) for group in part.groups]
    elements = [_PASSES * sum(map(leaving, group)) for group in part.groups]
    attended = attention(part, inventory)
    first = next((index for index, each in enumerate(linears) if each), len(linears))
    stages = range(len(linears))
    scores = attended * sum(index > first for index in stages)
    entering = sum(sum(elements[:index]) for index in stages)
    teachers = merged = sum(linears) + attended
    merged += scores + (0 if kept else sum(sum(linears[:index]) for index in stages))
    teachers += 0 if kept else scores + sum(sum(linears[: index + 1]) for index in stages)
    return Work(
        {
            ("teachers", "forward"): tokens * teachers,
            ("teachers", "elements"): tokens * (sum(elements) + (0 if kept else entering)),
            ("merged stream", "forward"): tokens * merged,
            ("merged stream", "elements"): tokens * (sum(elements) + entering),
        }
    )


def linear_fit(unit: UnitShape, unknowns: int, inventory: Inventory, *, sensitivity: bool) -> Work:
    """Sums, solution and judgement of one linear.

    Args:
        unknowns: of a column.
    """
    text = inventory.text
    out, columns = unit.leaves, unit.enters
    terms = text.models if sensitivity else 1
    gradient_tokens = text.first_tokens(TOKENS) // max(1, text.models)
    # A metric is a matrix, or the gradients where they are fewer than half of its rows.
    metric = (
        (2 * out * out if 2 * gradient_tokens > out else 4 * gradient_tokens * out)
        if sensitivity
        else 0
    )
    work = Work()
    work["Gram matrices", "fp32"] = 2 * text.fit_tokens * out * columns
    work["Gram matrices", "elements"] = _chunks(text) * out * columns
    if sensitivity:
        work["metrics", "fp32"] = text.first_tokens(TOKENS) * 2 * out * out
        # Energies of what teachers put out, and of targets.
        work["metrics", "fp32"] += 2 * text.tokens * metric
    work["judging", "fp32"] = 2 * text.held_out_tokens * (2 * out * columns + metric)
    work["merging", "elements"] = 3 * inventory.sources * out * columns
    dense = unknowns * columns <= DENSE_LIMIT
    precise = precision(unknowns * columns) == torch.float64
    speed: Speed = "fp64" if precise else "fp32"
    product = 2 * out * columns * columns
    # The loss and the residual at the start.
    work["solves", speed] += terms * (2 * product + metric * columns)
    pairs = unknowns * (unknowns + 1) // 2
    work["solves", "elements"] = 4 * (unknowns + 2) * out * columns * inventory.sources
    if dense:
        work["solves", "fp32"] += terms * (pairs * product + unknowns * metric * columns)
        work["solves", "elements"] += terms * pairs * 2 * columns * columns
        work["solves", "cholesky"] = (unknowns * columns) ** 3 // 3
        iterations = 2 if precise else 1
    else:
        iterations = 1 + ITERATIONS
    work["solves", speed] += terms * iterations * (product + metric * columns)
    work["solves", "elements"] += iterations * (2 * unknowns + 2) * out * columns
    return work


def experts_fit(unit: UnitShape, unknowns: int, inventory: Inventory, *, sensitivity: bool) -> Work:
    """The fits of all experts, of the tokens that are sent to each.

    For every linear the expert runs anew, the teachers' and the merged one.
    """
    text, work = inventory.text, Work()
    work["teachers", "fp32"] = len(unit.linears) * text.tokens * unit.product
    work["merged stream", "fp32"] = len(unit.linears) * text.tokens * unit.product
    if sensitivity:
        work["backward", "fp32"] = 2 * text.first_tokens(TOKENS) * unit.product
    for linear in unit.linears:
        columns = linear.enters
        work["Gram matrices", "fp32"] += unit.sent * 2 * text.fit_tokens * columns**2
        work["Gram matrices", "elements"] += unit.experts * _chunks(text) * columns**2
        one = linear_fit(linear, unknowns, inventory, sensitivity=sensitivity)
        for (kind, speed), amount in one.items():
            by_token = kind in ("Gram matrices", "metrics", "judging") and speed == "fp32"
            work[kind, speed] += amount * (unit.sent if by_token else unit.experts)
    return work


def gradients(part: PartSize, inventory: Inventory, tokens: int) -> Work:
    """A run of a part, and back to what entered it; weights have no gradients."""
    flops, elements = forward(part, inventory, tokens)
    return Work(
        {("backward", _run(part)): 2 * flops, ("backward", "elements"): 2 * elements}
    ) + merging(part, inventory, 1)


def _output_fit(part: PartSize, inventory: Inventory) -> Work:
    """The norm before the head, and the head's descent where it is not tied."""
    text = inventory.text
    work = Work()
    work["norms and embeddings", "elements"] = 16 * text.tokens * inventory.hidden
    if not part.fits_head:
        return work
    weight = sum(unit.parameters for unit in part.of("head"))
    looks = 1 + head.STEPS // head.JUDGE_EVERY
    seen = 2 * text.fit_tokens + looks * text.held_out_tokens
    steps = head.STEPS * text.models * text.length
    work["head", "fp32"] = 2 * weight * (2 * seen + 3 * steps)
    work["head", "elements"] = _LOGITS_PASSES * inventory.vocabulary * (seen + 2 * steps)
    # Every step merges the weight, turns its gradient, and converts the teachers'.
    passes = 2 * inventory.sources + 2 * text.models
    work["head", "elements"] += head.STEPS * passes * weight
    return work


def survey(inventory: Inventory) -> Work:
    """Every teacher and the model at the start, run once."""
    work = Work()
    for part in inventory.parts[:-1]:
        flops, elements = forward(part, inventory, inventory.text.tokens)
        work["teachers", "forward"] += flops
        work["merged stream", "forward"] += flops
        work["teachers", "elements"] += elements + inventory.text.models * part.parameters
        work["merged stream", "elements"] += elements
        work += merging(part, inventory, 1)
    return work + judgement(inventory)


def judgement(inventory: Inventory) -> Work:
    """The KL of the whole model from its teachers, from what left the last block."""
    flops, _ = forward(inventory.parts[-1], inventory, inventory.text.held_out_tokens)
    logits = inventory.vocabulary * inventory.text.held_out_tokens
    return Work({("judging", "fp32"): 2 * flops, ("judging", "elements"): _LOGITS_PASSES * logits})


def backward_sweep(inventory: Inventory) -> Work:
    """Gradients of the loss at what leaves every block."""
    tokens = inventory.text.first_tokens(TOKENS)
    work = gradients(inventory.parts[-1], inventory, tokens)
    work["backward", "elements"] += _LOGITS_PASSES * inventory.vocabulary * tokens
    for part in inventory.blocks[1:]:
        work += gradients(part, inventory, tokens)
    return work


def layer_sweep(inventory: Inventory, *, kept: bool, sensitivity: bool) -> Work:
    """Fits of all parts, one after the other."""
    work = Work()
    for part in inventory.parts:
        work += layer_fit(part, inventory, kept=kept, sensitivity=sensitivity)
    return work


def descent(inventory: Inventory, settings: RunParameters, steps: int) -> Work:
    """So many steps of the end-to-end objective, with the looks at held-out data between them."""
    text = inventory.text
    sequences = settings.batch_size * settings.gradient_accumulation
    tokens = sum(min(sequences, n) for n in text.sequences) * text.length
    judged = looks(steps)
    work = Work()
    for part in inventory.parts:
        flops, elements = forward(part, inventory, tokens)
        # Forward; forward again and back to weights and to what entered; the head runs once less.
        runs = 4 if part.kind != "output" else 3
        work["descent", _run(part)] += steps * (runs + (part.kind == "output")) * flops
        work["descent", "elements"] += steps * runs * elements
        flops, elements = forward(part, inventory, text.held_out_tokens)
        work["descent", _run(part)] += judged * flops
        work["descent", "elements"] += judged * elements
        # Of weights: merged, turned from their gradient, and merged again at a look.
        passes = inventory.sources * (3 * steps + judged)
        work["descent", "elements"] += passes * part.parameters
    logits = inventory.vocabulary * (steps * 2 * tokens + judged * text.held_out_tokens)
    work["descent", "elements"] += _LOGITS_PASSES * logits
    return work


def looks(steps: int) -> int:
    """How often a descent of so many steps is judged on held-out data, about."""
    return min(steps, LOOKS + 1)


def written(inventory: Inventory) -> Work:
    """The last sweep of a search, or a replay: every tensor merged once."""
    count = sum(tensor.parameters for tensor in inventory.tensors)
    return Work({("merging", "elements"): inventory.sources * count})


def total(work: Mapping[tuple[str, Speed], int]) -> int:
    """Flops, of all kinds."""
    return sum(count for (_, speed), count in work.items() if speed != "elements")


def _chunks(text: Text) -> int:
    """Chunks that the sequences of the fit are cut into."""
    each = max(1, CHUNK_TOKENS // text.length)
    splits = zip(text.sequences, text.held_out, strict=True)
    return sum(-(-(count - held) // each) for count, held in splits)
