"""The flops of a search beside its layer fits: survey, backward sweep, descents, and writing.

A change of the loops in `search/` is a change of this file.
"""

from mergekit_dam.estimate.flops import LOGITS_PASSES, forward, gradients, merging, run_speed
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.sizes import PartSize
from mergekit_dam.fitting.costs import Work
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.pace import judged_steps


def survey(inventory: Inventory, *, measures: bool, teachers: bool) -> Work:
    """One run of the model at the start on the tokens that are asked for.

    Args:
        measures: the tokens that give metrics run, and not only those that judge it.
        teachers: every teacher runs, too, on all of its tokens.
    """
    work, text = Work(), inventory.text
    tokens = text.judging_tokens + (text.gradient_tokens if measures else 0)
    for part in inventory.parts[:-1]:
        flops, elements = forward(part, inventory, tokens)
        work["merged stream", "forward"] += flops
        work["merged stream", "elements"] += elements
        if teachers:
            flops, elements = forward(part, inventory, text.tokens)
            work["teachers", "forward"] += flops
            work["teachers", "elements"] += elements + inventory.text.models * part.parameters
        work += merging(part, inventory, 1)
    return work + judgement(inventory)


def judgement(inventory: Inventory) -> Work:
    """The KL of the whole model from its teachers, given what left the last block."""
    flops, _ = forward(inventory.parts[-1], inventory, inventory.text.judging_tokens)
    logits = inventory.vocabulary * inventory.text.judging_tokens
    return Work({("judging", "fp32"): 2 * flops, ("judging", "elements"): LOGITS_PASSES * logits})


def backward_sweep(inventory: Inventory) -> Work:
    """Gradients of the loss at what leaves every block."""
    tokens = inventory.text.gradient_tokens
    work = gradients(inventory.parts[-1], inventory, tokens)
    work["backward", "elements"] += LOGITS_PASSES * inventory.vocabulary * tokens
    for part in inventory.blocks[1:]:
        work += gradients(part, inventory, tokens)
    return work


def descent(inventory: Inventory, settings: RunParameters, steps: int) -> Work:
    """Steps of the end-to-end objective, with the judgements on held-out data between them."""
    text = inventory.text
    tokens = settings.gradient_accumulation * text.batch_tokens(settings.batch_size)
    judged = looks(steps)
    work = Work()
    for part in inventory.parts:
        flops, elements = forward(part, inventory, tokens)
        # A step runs forward; then again forward, and back to weights and to what entered. The
        # output runs once for the merged model and once for the teacher.
        runs = 4 if part.kind != "output" else 3
        work["descent", run_speed(part)] += steps * (runs + (part.kind == "output")) * flops
        work["descent", "elements"] += steps * runs * elements
        flops, elements = forward(part, inventory, text.judging_tokens)
        work["descent", run_speed(part)] += judged * flops
        work["descent", "elements"] += judged * elements
        # Weights are merged twice, and once more when judged; gradients turn into coefficients'.
        passes = inventory.sources * (3 * steps + judged)
        work["descent", "elements"] += passes * part.parameters
        work += _factors(part, steps * settings.gradient_accumulation, judged)
    logits = inventory.vocabulary * (steps * 2 * tokens + judged * text.judging_tokens)
    work["descent", "elements"] += LOGITS_PASSES * logits
    return work


def _factors(part: PartSize, gradients: int, judged: int) -> Work:
    """Work on the factors of a part's corrections: merged with the weights, and their gradients."""
    work = Work()
    for tensor in part.tensors:
        if tensor.factors:
            multiplied = tensor.rank * tensor.parameters
            work["descent", "fp32"] += 4 * gradients * multiplied
            work["descent", "elements"] += (2 * gradients + judged) * multiplied
    return work


def looks(steps: int) -> int:
    """How often a descent of some steps is judged on held-out data."""
    return len(judged_steps(steps))


def written(inventory: Inventory) -> Work:
    """The last sweep of a search, or a replay: every tensor merged once."""
    count = sum(tensor.parameters for tensor in inventory.tensors)
    return Work({("merging", "elements"): inventory.sources * count})
