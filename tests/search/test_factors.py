"""Factors of corrections that move in a descent, against autograd and AdamW in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergekit_dam.choices import CorrectionKind
from mergekit_dam.coefficients.correction import Correction, Corrections
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.journal import Journal
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.coordinates import Coordinate
from mergekit_dam.search.descender import Descender
from mergekit_dam.search.factors import Factors, starting_factors
from mergekit_dam.search.gradient import Batch, Objective
from mergekit_dam.streams.boundaries import BoundaryStates
from tests.kit.autograd import plain_loss
from tests.kit.networks import Made, make
from tests.kit.settings import logits_settings
from tests.kit.tensors import randn

RANK = 2


def made_with_factors(
    name: str, folder: Path, kind: CorrectionKind
) -> tuple[Made, Corrections, Factors]:
    """A network, corrections of some of its tensors, and moving factors of all of them."""
    made = make(name, correction=kind, correction_rank=RANK)
    start = Corrections(folder / "start")
    corrected = [own for own in made.coordinates.values() if own.rank]
    assert corrected
    for number, own in enumerate(corrected[::2]):
        *experts, out, columns = own.shape
        left, right = randn(*experts, out, RANK, seed=number), randn(*experts, RANK, columns)
        if kind == "full":
            start.put(own.name, Correction(0.01 * left @ right))
        else:
            start.put(own.name, Correction(left=0.1 * left, right=0.1 * right))
    factors = Factors(made.coordinates.values(), start, folder=folder / "moving", seed=1)
    return made, start, factors


def whole(correction: Correction | None, own: Coordinate) -> Tensor:
    """A correction as one matrix, fp64 `[out, in]`."""
    total = torch.zeros(own.shape, dtype=torch.float64)
    if correction is None:
        return total
    if correction.full is not None:
        total = total + correction.full
    for left, right in correction.pairs:
        total = total + left.double() @ right.double()
    return total


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_factors_start_where_the_corrections_are(
    name: str, kind: CorrectionKind, tmp_path: Path
) -> None:
    made, start, factors = made_with_factors(name, tmp_path, kind)
    assert factors.move
    for own in made.coordinates.values():
        found = factors.get(own.name)
        if not own.rank:
            assert found is None
            continue
        assert found is not None
        assert whole(found, own).equal(whole(start.get(own.name), own))
        moving = part(factors, own.name, "right")
        identity = torch.eye(RANK).expand(*own.shape[:-2], RANK, RANK)
        torch.testing.assert_close(moving @ moving.mT, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_of_factors_agree_with_autograd(
    name: str, kind: CorrectionKind, tmp_path: Path
) -> None:
    """Also where a step accumulates the gradients of several batches."""
    made, start, factors = made_with_factors(name, tmp_path, kind)
    moved = [own for own in made.coordinates.values() if own.rank]
    for number, own in enumerate(moved):
        left = part(factors, own.name, "left")
        left.add_(0.05 * randn(*left.shape, seed=number))
    settings = logits_settings(steps=1, gradient_accumulation=2)
    boundaries = BoundaryStates(tmp_path / "boundaries")
    objective = Objective(made.network(), made.coordinates, settings, boundaries)
    point = made.point()
    point.corrections = factors
    batches = made.batches()
    for _ in range(2):
        objective(point, batches, factors)

    expected = plain_gradients(made, point, start, factors, batches, settings)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for own in moved:
        for side in ("left", "right"):
            factor = part(factors, own.name, side)
            assert factor.grad is not None
            torch.testing.assert_close(
                factor.grad.double(), expected[own.name, side], rtol=1e-3, atol=1e-5 * largest
            )


def part(factors: Factors, name: str, side: str) -> Tensor:
    """One factor that moves."""
    return dict(zip(("left", "right"), factors.moving(name), strict=True))[side]


def plain_gradients(
    made: Made,
    point: MergeRecord,
    start: Corrections,
    factors: Factors,
    batches: list[Batch],
    settings: RunParameters,
) -> dict[tuple[str, str], Tensor]:
    """Gradients of all factors by autograd, in fp64, with all models in one graph."""
    merged = made.differentiable(
        {name: rows.double() for name, rows in point.coefficients.items()},
        {name: own.axis for name, own in made.coordinates.items()},
    )
    live: dict[tuple[str, str], Tensor] = {}
    for name, own in made.coordinates.items():
        if own.rank:
            for side in ("left", "right"):
                live[name, side] = part(factors, name, side).double().requires_grad_()
            added = live[name, "left"] @ live[name, "right"]
            added = added + whole(start.get(name), own)
            last = own.axis % added.ndim == added.ndim - 1
            merged[name] = merged[name] + (added if last else added.mT)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        teacher = made.logits(made.weights[batch.source], batch.tokens)
        own_loss = plain_loss(made.logits(merged, batch.tokens), teacher, settings)
        loss = loss + batch.weight * own_loss
    found = torch.autograd.grad(loss, list(live.values()))
    return dict(zip(live, found, strict=True))


def test_the_optimiser_in_files_is_adamw(tmp_path: Path) -> None:
    coordinate = make(correction="low_rank", correction_rank=RANK).coordinates
    own = next(c for c in coordinate.values() if c.rank)
    factors = Factors([own], None, folder=tmp_path, seed=0)
    moving = [part(factors, own.name, side) for side in ("left", "right")]
    theirs = [factor.clone().requires_grad_() for factor in moving]
    ours, plain = factors.optimizer(1e-2), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0)
    for step in range(3):
        ours.zero_grad(set_to_none=False)
        gradient = randn(*own.shape, seed=step)
        left, right = (f.detach().clone() for f in theirs)
        theirs[0].grad, theirs[1].grad = gradient @ right.T, left.T @ gradient
        factors.add_gradient(own.name, gradient, 1.0)
        ours.step()
        plain.step()
    for found, expected in zip(moving, theirs, strict=True):
        torch.testing.assert_close(found, expected.detach())
    assert {file.suffix for file in tmp_path.iterdir()} == {".left", ".right"}


def test_what_is_kept_stays_when_factors_move_on(tmp_path: Path) -> None:
    made, _, factors = made_with_factors("llama", tmp_path, "full")
    names = list(made.weights[0])
    kept = factors.kept(names, tmp_path / "kept", Journal(tmp_path, keeps=False))
    before = {name: factors.get(name) for name in names}
    wanted = {n: {k: t.clone() for k, t in c.tensors.items()} for n, c in before.items() if c}
    for name in wanted:
        part(factors, name, "left").add_(1.0)
    for name in names:
        found = kept.get(name)
        assert (found is None) == (name not in wanted)
        if found is not None:
            assert found.tensors.keys() == wanted[name].keys()
            assert all(t.equal(wanted[name][key]) for key, t in found.tensors.items())


def test_random_factors_depend_on_the_seed_and_the_name_alone() -> None:
    own = next(c for c in make(correction="full").coordinates.values() if c.rank)
    first, again, other = (starting_factors(own, None, seed)[1] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_further_descent_goes_on_with_the_same_factors(tmp_path: Path) -> None:
    made, _, factors = made_with_factors("llama", tmp_path, "low_rank")
    own = next(own for own in made.coordinates.values() if own.rank)
    part(factors, own.name, "left").add_(0.5)
    kept = factors.kept(made.weights[0], tmp_path / "kept", Journal(tmp_path, keeps=False))
    further = Factors(made.coordinates.values(), kept, folder=tmp_path / "further", seed=9)
    for one, other in zip(factors.moving(own.name), further.moving(own.name), strict=True):
        assert one.equal(other)
    before, after = factors.get(own.name), further.get(own.name)
    assert whole(before, own).equal(whole(after, own))
    assert after is not None
    assert len(after.pairs) == 2


@pytest.mark.parametrize(
    ("kind", "left", "steps", "asked", "rates"),
    [
        ("none", 0.1, 400, None, (0.1,)),
        ("low_rank", 1.0, 400, None, (0.05, 0.001)),
        ("low_rank", 0.1, 400, None, (0.0125, 0.00025)),
        ("low_rank", 1.0, 20, None, (0.025, 0.0005)),
        ("low_rank", 0.1, 20, None, (0.0025, 0.00005)),
        ("low_rank", 0.1, 20, 0.02, (0.02, 0.0004)),
    ],
)
def test_rates_suit_how_near_the_start_is_where_factors_move(
    kind: CorrectionKind,
    left: float,
    steps: int,
    asked: float | None,
    rates: tuple[float, ...],
    tmp_path: Path,
) -> None:
    """Those of all coefficients, also without factors; those of short descents are lower."""
    made, _, factors = (
        made_with_factors("llama", tmp_path, kind) if kind != "none" else plain(tmp_path)
    )
    settings = logits_settings(steps=steps, learning_rate=asked)
    boundaries = BoundaryStates(tmp_path / "boundaries")
    objective = Objective(made.network(), made.coordinates, settings, boundaries)
    descender = Descender(objective, made.point(), steps, factors, left)
    for optimizer, rate in zip(descender.optimizers, rates, strict=True):
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([rate] * len(found))


def plain(folder: Path) -> tuple[Made, None, Factors]:
    """A network without corrections."""
    made = make("llama")
    return made, None, Factors(made.coordinates.values(), None, folder=folder, seed=0)
