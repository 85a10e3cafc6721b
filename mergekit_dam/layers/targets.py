"""What a unit should put out, and how much each token counts.

The target of a unit inside a part is the teacher's own output. For one that writes to the
residual stream with scale s it is `y_teacher + (r_teacher - r_merged) / s`, where r are the
residual streams as they stand at that point. Where a norm stands between, `s * norm(y)` is
what is added: the target is the y whose norm is `norm(y_teacher) + (r_teacher - r_merged) / s`
and whose size, which a norm does not see, is the teacher's.

A few tokens (the first of a sequence, delimiters) carry activations, and drifts, hundreds of
times as large as the others'. No weight is to be spent on them alone: a token counts in full
up to the median energy of its sequence's targets, beyond that in inverse proportion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.layers.seen import Seen
from mergekit_dam.layers.state import Walk
from mergekit_dam.model.units import Unit

_SMALLEST_GAIN = 1e-3
"""Gain of a norm, relative to its largest, under which a feature cannot be steered through it."""


def target(walk: Walk, unit: Unit, seen: Seen) -> Tensor:
    """What a unit should put out for a chunk, in the shape of its output."""
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


def token_weights(targets: Sequence[Tensor], sequences: int) -> Tensor:
    """Weights of a chunk's tokens, fp32 `[tokens]`, in (0, 1].

    Args:
        targets: of the units of one stage, each `[..., features]` with the sequences first;
            relative to the median, their energies are averaged.
        sequences: number of sequences. Medians are theirs, so that chunks do not matter.
    """
    relative = []
    for wanted in targets:
        energy = wanted.reshape(-1, wanted.shape[-1]).square().sum(-1).reshape(sequences, -1)
        median = energy.median(dim=1, keepdim=True).values
        relative.append(energy / median.clamp_min(1e-30))
    mean = torch.stack(relative).mean(0)
    return mean.clamp_min(1).reciprocal().reshape(-1)


def before_norm(output: Tensor, wanted: Tensor, gain: Tensor) -> Tensor:
    """The y of the teacher's size whose norm `gain * n(y)` points where it is wanted.

    Args:
        output: teacher's y `[..., features]`; features with hardly any gain keep it.
        wanted: the norm's output to reach, without bias.
        gain: of the merged norm, `[features]`.
    """
    steered = gain.abs() > _SMALLEST_GAIN * gain.abs().max()
    normalised = wanted / torch.where(steered, gain, 1)
    inner = (normalised * output * steered).sum(-1, keepdim=True)
    size = inner / (normalised.square() * steered).sum(-1, keepdim=True).clamp_min(1e-12)
    # A negative size would turn the output around: the streams are too far apart to repair.
    return torch.where(steered & (size > 0), size * normalised, output)


def flat(x: Tensor) -> Tensor:
    """`[..., features]` as `[tokens, features]`."""
    return x.reshape(-1, x.shape[-1])
