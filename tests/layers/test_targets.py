"""The targets of units: what the merged model has to put out to follow its teachers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from mergekit_dam.fitting.moments import InputMoments, LinearMoments
from mergekit_dam.layers.gather import gather
from mergekit_dam.layers.seen import Seen
from mergekit_dam.layers.state import Walk
from mergekit_dam.layers.targets import before_norm, target, token_weights
from mergekit_dam.model.hooks import substitute
from mergekit_dam.model.part import block_part
from mergekit_dam.model.units import Unit
from mergekit_dam.streams.stream import Stream
from tests.kit.tensors import CPU, LENGTH, randn
from tests.kit.walks import walk_of


def test_tokens_up_to_the_median_energy_count_in_full_and_others_inversely() -> None:
    energies = torch.tensor([[1.0, 4.0, 2.0, 8.0, 0.0], [3.0, 3.0, 3.0, 3.0, 300.0]])
    targets = torch.zeros(2, 5, 4)
    targets[:, :, 1] = energies.sqrt()
    expected = torch.tensor([1, 1 / 2, 1, 1 / 4, 1, 1, 1, 1, 1, 1 / 100])
    torch.testing.assert_close(token_weights([targets], 2), expected)
    torch.testing.assert_close(token_weights([targets.flatten(0, 1)], 2), expected)


def test_token_weights_do_not_depend_on_size_or_chunks_and_average_over_units() -> None:
    a, b = randn(4, 7, 5), randn(4, 7, 9, seed=1)
    whole = token_weights([a, b], 4)
    torch.testing.assert_close(token_weights([1e3 * a, 1e-3 * b], 4), whole)
    parts = [token_weights([a[i : i + 2], b[i : i + 2]], 2) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    energy = [
        x.square().sum(-1) / x.square().sum(-1).median(1, keepdim=True).values for x in (a, b)
    ]
    expected = 1 / ((energy[0] + energy[1]) / 2).clamp_min(1).flatten()
    torch.testing.assert_close(whole, expected)
    assert whole.min() > 0
    assert whole.max() == 1


def test_targets_of_no_energy_leave_all_tokens_equal() -> None:
    assert token_weights([torch.zeros(2, 3, 4)], 2).equal(torch.ones(6))


@pytest.mark.parametrize("small", [False, True])
def test_the_target_before_a_norm_gives_what_is_wanted_after_it(small: bool) -> None:
    """Where a norm's output can be reached at all, that is, of root mean square 1 before gain."""
    gain = 1 + 0.2 * randn(16)
    if small:
        gain[3] = 1e-6  # cannot be steered through: keeps the teacher's
    output = randn(5, 16, seed=1)
    direction = output + 0.3 * randn(5, 16, seed=2)
    direction[:, 3] = output[:, 3]
    wanted = gain * rms_norm(direction, (16,))
    target = before_norm(output, wanted, gain)
    reached = gain * rms_norm(target, (16,))
    if small:
        assert target[:, 3].equal(output[:, 3])
        torch.testing.assert_close(reached, wanted, rtol=0, atol=0.1)
    else:
        torch.testing.assert_close(reached, wanted, rtol=0, atol=1e-5)


def test_the_target_before_a_norm_is_the_teachers_output_where_nothing_is_missing() -> None:
    gain, output = 1 + 0.2 * randn(16), randn(5, 16, seed=1)
    wanted = gain * rms_norm(output, (16,))
    torch.testing.assert_close(before_norm(output, wanted, gain), output)


def test_a_target_that_would_turn_the_output_around_is_given_up() -> None:
    gain, output = torch.ones(16), randn(5, 16, seed=1)
    assert before_norm(output, -output, gain).equal(output)


def targets(walk: Walk, unit: Unit) -> Tensor:
    """The target of a unit over all the data."""
    found: list[Tensor] = []
    stage = next(i for i, units in enumerate(walk.anatomy.groups) if unit in units)

    def add(_: Mapping[str, Any], seen: Seen) -> None:
        found.append(target(walk, unit, seen))

    def empty(_: Stream) -> dict[str, LinearMoments]:
        return {unit.name: LinearMoments.zeros(1, InputMoments.zeros(1, CPU))}

    with torch.no_grad():
        gather(walk, stage, [unit], empty=empty, judges=empty, add=add, pool=True)
    return torch.cat(found)


SEQUENTIAL = ("llama", "gpt2", "bloom", "granite", "qwen3", "starcoder2", "phi3")
PARALLEL = ("gpt-neox", "falcon", "cohere", "phi")


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL])
def test_a_last_writer_that_meets_its_target_ends_on_the_teachers_stream(name: str) -> None:
    """Whatever went before it: another model's weights, and a stream that has drifted."""
    x = randn(4, LENGTH, 16)
    walk, _ = walk_of(name, partial(block_part, index=0), x, 0.3 * randn(4, LENGTH, 16, seed=1))
    last = [unit for unit in walk.anatomy.units if unit.write][-1]
    wanted = targets(walk, last)
    with torch.no_grad(), substitute(walk.part.root, {last.name: wanted}):
        leaving = walk.part.run(walk.weights, walk.streams[0].merged[:])
    teacher = walk.part.run(walk.teacher_weights(walk.streams[0]), x)
    torch.testing.assert_close(leaving, teacher, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_first_writer_that_meets_its_target_sets_what_follows_right(name: str) -> None:
    """From the drifted stream, with the teacher's own weights behind the writer."""
    x = randn(4, LENGTH, 16)
    walk, _ = walk_of(name, partial(block_part, index=0), x, 0.3 * randn(4, LENGTH, 16, seed=1))
    first = next(unit for unit in walk.anatomy.units if unit.write)
    wanted = targets(walk, first)
    own = walk.teacher_weights(walk.streams[0])
    with torch.no_grad(), substitute(walk.part.root, {first.name: wanted}):
        leaving = walk.part.run(own, walk.streams[0].merged[:])
    torch.testing.assert_close(leaving, walk.part.run(own, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_writer_behind_a_norm_steers_it_to_where_the_teachers_stream_is(name: str) -> None:
    """The output of the norm then points to the missing part; its size is the norm's own.

    The norm itself, fitted next, gets the whole of what is missing for its target.
    """
    x = randn(4, LENGTH, 16)
    walk, _ = walk_of(name, partial(block_part, index=0), x, 0.3 * randn(4, LENGTH, 16, seed=1))
    linear = [u for u in walk.anatomy.units if u.write and u.write.through][-1]
    norm = walk.anatomy.units[-1]
    assert linear.write is not None
    assert linear.write.through == norm.name
    own = walk.teacher_weights(walk.streams[0])
    with torch.no_grad():
        teacher = walk.part.run(own, x)
        with substitute(walk.part.root, {norm.name: targets(walk, norm)}):
            leaving = walk.part.run(walk.weights, walk.streams[0].merged[:])
        torch.testing.assert_close(leaving, teacher, rtol=0, atol=2e-5)

        wanted = targets(walk, norm)
        with substitute(walk.part.root, {linear.name: targets(walk, linear)}):
            reached = walk.part.captured(
                walk.weights, walk.streams[0].merged[:], outputs=(norm.name,)
            ).outputs[norm.name]
    gain = walk.weights[norm.parameter("weight")] + norm.unit_gain
    alike = torch.cosine_similarity(reached / gain, wanted / gain, dim=-1)
    assert alike.min() > 1 - 1e-5
