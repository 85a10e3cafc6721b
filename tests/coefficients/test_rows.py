"""Rows of saved coefficients find their models."""

import itertools

import pytest

from mergekit_dam.coefficients.rows import Identity, match_rows

A, B, C = (Identity(name, {"model.safetensors": 64 * name[-1]}) for name in ("x/a", "x/b", "x/c"))
SAVED = (A, B, C)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_models_are_known_by_their_weights_under_any_names(order: tuple[int, ...]) -> None:
    moved = [Identity(f"elsewhere/{k}", SAVED[row].files) for k, row in enumerate(order)]
    found = match_rows(SAVED, moved)
    assert found.rows == order
    assert not found.changed


def test_weights_count_more_than_names() -> None:
    swapped = [Identity("x/b", A.files), Identity("x/a", B.files), C]
    found = match_rows(SAVED, swapped)
    assert found.rows == (0, 1, 2)
    assert not found.changed


def test_of_equal_weights_the_name_decides() -> None:
    twins = (Identity("x/a", A.files), Identity("x/b", A.files))
    assert match_rows(twins, twins[::-1]).rows == (1, 0)


def test_a_model_with_other_weights_keeps_its_row_and_is_told_with_the_file() -> None:
    trained = Identity("x/b", {"model.safetensors": 64 * "0"})
    found = match_rows(SAVED, [trained, C, A])
    assert found.rows == (1, 2, 0)
    assert found.changed == (
        "x/b: model.safetensors has other weights (sha256 000000000000) than in that merge "
        "(bbbbbbbbbbbb)",
    )


def test_files_that_came_and_went_are_told() -> None:
    again = Identity("x/a", {"model-00001-of-00002.safetensors": 64 * "a"})
    first, second = match_rows([A], [again]).changed
    assert first == "x/a: model-00001-of-00002.safetensors was no file of the merged model"
    assert second == "x/a: model.safetensors is missing"


def test_a_model_of_unknown_name_and_weights_takes_what_is_left_and_is_told() -> None:
    found = match_rows(SAVED, [C, Identity("new", {"model.safetensors": 64 * "9"}), A])
    assert found.rows == (2, 1, 0)
    (said,) = found.changed
    assert said.startswith("new has neither the weights nor the name")
    assert said.endswith("the coefficients of x/b")
    assert found.named == 2


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ("a", "/disk/models/a"),
        ("/disk/models/a", "a"),
        ("../models/a", "/disk/models/a"),
        ("org/a", "org/a"),
    ],
)
def test_a_name_means_a_path_that_ends_with_it(saved: str, now: str) -> None:
    found = match_rows([Identity("b"), Identity(saved)], [Identity(now), Identity("b")])
    assert found.rows == (1, 0)
    assert not found.changed


def test_a_name_does_not_mean_a_path_that_ends_with_its_letters() -> None:
    assert match_rows([Identity("a")], [Identity("/disk/extra")]).named == 0
    assert match_rows([Identity("a")], [Identity("/disk/ba")]).named == 0
