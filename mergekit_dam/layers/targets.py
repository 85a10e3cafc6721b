"""The target of a unit, and the weight of each token.

The target of a unit inside a part is the teacher's own output. If the unit writes to the residual
stream with scale s, the target is `y_teacher + (r_teacher - r_merged) / s`, where r are the
residual streams at that point. If a norm stands between, the unit adds `s * norm(y)`. The target
is then the y whose norm is `norm(y_teacher) + (r_teacher - r_merged) / s`; its size, which the
norm ignores, is that of the teacher's y.

A few tokens (the first of a sequence, delimiters) carry activations and drifts that are hundreds
of times as large as the others'. They must not take over the fit: a token counts in full up to
the median energy of its sequence's targets, and in inverse proportion beyond.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.layers.seen import Seen
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.units import Unit

_SMALLEST_GAIN = 1e-3
"""Gain relative to a norm's largest below which the norm's input cannot steer a feature."""


def target(walk: Walk, unit: Unit, seen: Seen) -> Tensor:
    """The target of a unit for a chunk, in the shape of the unit's output."""
    output = seen.teacher.outputs[unit.name]
    if unit.write is None:
        return output
    missing = (seen.drift / unit.write.scale).reshape(output.shape)
    if unit.write.through is None:
        return output + missing
    norm = next(u for u in walk.anatomy.units if u.name == unit.write.through)
    own = {p: walk.weights[norm.parameter(p)] for p in norm.parameters}
    wanted = seen.teacher.outputs[norm.name] + missing - own.get("bias", 0)
    return before_norm(output, wanted, own["weight"] + norm.unit_gain)


def token_weights(
    targets: Sequence[Tensor], sequences: int, counted: Tensor | None = None
) -> Tensor:
    """Weights of a chunk's tokens, fp32 `[tokens]`, in (0, 1]; 0 for those that do not count.

    Args:
        targets: targets of the units of one group, each `[..., features]` with the sequences
            first. Each unit's energy is divided by its median; then the units are averaged.
        sequences: number of sequences. Medians are taken per sequence, so chunks do not matter.
        counted: which tokens count, bool `[tokens]`; None if all do.
    """
    relative = []
    for wanted in targets:
        energy = wanted.reshape(-1, wanted.shape[-1]).square().sum(-1).reshape(sequences, -1)
        own = None if counted is None else counted.reshape(sequences, -1)
        relative.append(energy / _medians(energy, own).clamp_min(1e-30))  # not 0 / 0
    mean = torch.stack(relative).mean(0)
    weights = mean.clamp_min(1).reciprocal().reshape(-1)
    return weights if counted is None else weights.where(counted, 0)


def _medians(energy: Tensor, counted: Tensor | None) -> Tensor:
    """Median of what counts in every row, `[rows, 1]`: the lower one of two in the middle.

    torch's own median does not say on a GPU that it is the same in every run; a sort does.
    """
    if counted is None:
        return energy.sort(dim=1).values[:, (energy.shape[1] - 1) // 2, None]
    middle = (counted.sum(1, keepdim=True) - 1).div(2, rounding_mode="floor").clamp_min(0)
    return energy.where(counted, torch.inf).sort(dim=1).values.gather(1, middle)


def before_norm(output: Tensor, wanted: Tensor, gain: Tensor) -> Tensor:
    """The y of about the teacher's size for which `gain * n(y)` has the wanted direction.

    Args:
        output: teacher's y `[..., features]`; features with hardly any gain keep it.
        wanted: target of the norm's output, without bias.
        gain: gain of the merged norm, `[features]`.
    """
    steered = gain.abs() > _SMALLEST_GAIN * gain.abs().max()
    normalised = wanted / torch.where(steered, gain, 1)
    inner = (normalised * output * steered).sum(-1, keepdim=True)
    size = inner / (normalised.square() * steered).sum(-1, keepdim=True).clamp_min(1e-12)
    # A negative size would flip the output: the streams are too far apart to repair.
    return torch.where(steered & (size > 0), size * normalised, output)


def flat(x: Tensor) -> Tensor:
    """`[..., features]` as `[tokens, features]`."""
    return x.reshape(-1, x.shape[-1])
