"""Corrections: added to merged weights, and kept in files."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_dam.choices import CorrectionKind
from mergekit_dam.coefficients.correction import Correction, Corrections, stored_bytes
from mergekit_dam.coefficients.merge import merge_weights
from tests.kit.tensors import randn

RANK = 3


def factors(*first: int, out: int = 6, columns: int = 5) -> Correction:
    right = randn(*first, RANK, columns)
    return Correction(left=randn(*first, out, RANK, seed=1), right=right)


def product(correction: Correction) -> torch.Tensor:
    assert correction.left is not None
    assert correction.right is not None
    return correction.left.double() @ correction.right.double()


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("kind", ["full", "factors", "both"])
def test_a_merged_weight_gets_its_correction(kind: str, axis: int) -> None:
    tensors = [randn(6, 5, seed=2), randn(6, 5, seed=3)]
    correction = factors()
    added = product(correction)
    if kind == "full":
        correction = Correction(added.float())
    if kind == "both":
        whole = randn(6, 5, seed=9)
        correction = replace(correction, full=whole)
        added = added + whole
    if axis == 0:
        tensors = [tensor.T.contiguous() for tensor in tensors]
        added = added.T
    coefficients = torch.tensor([[0.25], [0.75]])
    merged = merge_weights(tensors, coefficients, axis=axis, correction=correction)
    plain = merge_weights(tensors, coefficients, axis=axis)
    torch.testing.assert_close(merged, (plain + added).float())


def test_factors_are_added_up_rank_by_rank_whatever_is_done_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    correction, by_hand = factors(), randn(6, 5, seed=4)
    merged = by_hand.clone()
    assert correction.left is not None
    assert correction.right is not None
    for k in range(RANK):
        by_hand += correction.left[:, k : k + 1] * correction.right[k : k + 1]
    monkeypatch.setattr("mergekit_dam.coefficients.correction._PIECE", 10)
    correction.add_to(merged)
    torch.testing.assert_close(merged, by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("as_written", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
def test_every_expert_of_a_fused_weight_gets_its_own(axis: int, as_written: bool) -> None:
    own = [factors(), None, factors()]
    correction = Correction.stacked(own)
    assert correction is not None
    merged = torch.zeros(3, 5, 6) if axis == 1 else torch.zeros(3, 6, 5)
    correction.add_to(merged, axis=axis, as_written=as_written)
    for part, expected in zip(merged, own, strict=True):
        facing = part.T if axis == 1 else part
        wanted = torch.zeros(6, 5) if expected is None else product(expected).float()
        torch.testing.assert_close(facing, wanted)
    assert Correction.stacked([None, None]) is None


def moved(start: Correction, factors: Correction) -> Correction:
    return replace(start, moved_left=factors.left, moved_right=factors.right)


@pytest.mark.parametrize("axis", [-1, 0])
def test_a_model_that_only_runs_has_the_same_corrections_in_one_product(axis: int) -> None:
    written = randn(6, 5) if axis == -1 else randn(5, 6)
    run = written.clone()
    correction = replace(moved(factors(), factors()), full=randn(6, 5, seed=5))
    correction.add_to(written, axis=axis)
    correction.add_to(run, axis=axis, as_written=False)
    torch.testing.assert_close(run, written)


@pytest.mark.parametrize("start", ["full", "factors"])
def test_factors_that_moved_are_added_last(start: str) -> None:
    first = Correction(randn(6, 5, seed=3)) if start == "full" else factors()
    one_by_one, at_once = torch.zeros(6, 5), torch.zeros(6, 5)
    first.add_to(one_by_one)
    factors().add_to(one_by_one)
    moved(first, factors()).add_to(at_once)
    assert at_once.equal(one_by_one)


def test_corrections_come_back_from_their_files_and_from_the_one_that_is_written(
    tmp_path: Path,
) -> None:
    kept = Corrections(tmp_path / "scratch")
    assert not kept
    whole = Correction(randn(2, 4))
    kept.put("b", factors())
    kept.put("a", whole)
    path = tmp_path / "dam_corrections.safetensors"
    before = {name: kept.get(name) for name in ("a", "b", "c")}
    digest = kept.save(path)
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"mergekit_dam": digest}
    assert not (tmp_path / "scratch").exists()
    assert set(load_file(path)) == {"a.full", "b.left", "b.right"}
    for own in (kept, Corrections.of_file(path)):
        assert own
        for name, expected in before.items():
            found = own.get(name)
            assert (found is None) == (expected is None) == (name == "c")
            if found is not None and expected is not None:
                assert found.tensors.keys() == expected.tensors.keys()
                assert all(t.equal(expected.tensors[key]) for key, t in found.tensors.items())


def test_the_same_corrections_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        kept = Corrections(tmp_path / f"scratch{number}")
        for name in names:
            kept.put(name, factors(out=4 if name == "a" else 6))
        kept.save(tmp_path / f"{number}.safetensors")
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)], ids=["a linear", "experts"])
@pytest.mark.parametrize("rank", [2, 9])
def test_stored_bytes_are_those_of_the_tensors(shape: tuple[int, ...], rank: int) -> None:
    *experts, out, columns = shape
    kept = min(rank, out, columns)
    whole = Correction(randn(*shape))
    small = kept * (out + columns) < out * columns  # else the matrix takes the factors' place
    factors = Correction(left=randn(*experts, out, kept), right=randn(*experts, kept, columns))
    for correction, kind, swept, descended in (
        (whole, "full", True, False),
        (moved(whole, factors), "full", True, True),
        (moved(Correction(), factors), "full", False, True),
        (factors if small else whole, "low_rank", True, False),
        (moved(factors if small else whole, factors), "low_rank", True, True),
    ):
        size = sum(tensor.nbytes for tensor in correction.tensors.values())
        asked = cast(CorrectionKind, kind)
        assert stored_bytes(shape, asked, rank, swept=swept, descended=descended) == size
    assert stored_bytes(shape, "none", rank) == stored_bytes(shape[-1:], "full", rank) == 0
