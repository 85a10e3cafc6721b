"""The map from unknowns to coefficients to merged weights, and the file that keeps them."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.coefficients.file import FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.errors import ConfigError

WEIGHTS = (1.0, 2.0, 0.5)
FORMS = {
    f"base={base} include={include} sum={sum_to_one}": Parametrisation.create(
        WEIGHTS, base=base, include_base=include, sum_to_one=sum_to_one
    )
    for base, include, sum_to_one in itertools.product((None, 0, 2), (False, True), (False, True))
    if base is not None or not include
}
SUMMING = [name for name in FORMS if "sum=True" in name]


def random_tensors(*shape: int, count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def share_of(name: str) -> Tensor:
    """The weighted average that a form should start from, worked out anew from its name."""
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    for base in (0, 2):
        if f"base={base} include=False" in name:
            weights[base] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_one_hot_coefficients_return_the_source_bit_for_bit(
    dtype: torch.dtype, columns: int, source: int
) -> None:
    tensors = [t.to(dtype) for t in random_tensors(4, 6)]
    for tensor in tensors:
        tensor[0, 0], tensor[1, 1] = -0.0, 0.0
        tensor[2, 2] = torch.finfo(dtype).smallest_normal / 4
        tensor[3, 3] = torch.finfo(dtype).max
    coefficients = torch.zeros(3, columns)
    coefficients[source] = 1
    merged = merge_weights(tensors, coefficients).to(dtype)
    assert merged.view(torch.uint8).equal(tensors[source].view(torch.uint8))


def test_infinite_weights_of_a_source_left_out_do_not_spread() -> None:
    tensors = [torch.full((2, 2), float("inf")), torch.ones(2, 2)]
    assert merge_weights(tensors, torch.tensor([[0.0], [1.0]])).equal(tensors[1])


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 4, 6)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_starting_coefficients_equal_mergekits_linear(
    shape: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    tensors = random_tensors(*shape)
    form = Parametrisation.create(weights, base=None, include_base=False, sum_to_one=True)
    merged = merge_weights(tensors, form.starting_coefficients())
    linear = merge_tensors(tensors, "linear", parameters={"weight": list(weights)})
    torch.testing.assert_close(merged, linear, rtol=0, atol=4e-7)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_coefficients_run_along_the_input_axis(axis: int) -> None:
    tensors = random_tensors(4, 6)
    coefficients = torch.randn(3, tensors[0].shape[axis])
    along = torch.diag_embed(coefficients)
    expected = (
        sum(c @ t for c, t in zip(along, tensors, strict=True))
        if axis == 0
        else sum(t @ c for t, c in zip(tensors, along, strict=True))
    )
    torch.testing.assert_close(merge_weights(tensors, coefficients, axis=axis), expected)


def test_a_scalar_is_merged_by_one_coefficient_a_source() -> None:
    merged = merge_weights([torch.tensor(2.0), torch.tensor(4.0)], torch.tensor([[0.5], [0.25]]))
    assert merged.shape == ()
    assert merged.item() == 2.0


def test_all_zero_coefficients_give_zeros_and_sources_are_not_changed() -> None:
    tensors = random_tensors(4, 6)
    before = [tensor.clone() for tensor in tensors]
    assert merge_weights(tensors, torch.zeros(3, 6)).equal(torch.zeros(4, 6))
    merge_weights(tensors, torch.randn(3, 6))
    merge_weights(tensors, torch.eye(3)[:, :1]).zero_()
    assert all(a.equal(b) for a, b in zip(tensors, before, strict=True))


def test_merging_is_in_fp32_whatever_the_sources_are() -> None:
    tensors = [t.bfloat16() for t in random_tensors(4, 6)]
    merged = merge_weights(tensors, torch.full((3, 1), 1 / 3))
    assert merged.dtype == torch.float32
    exact = sum((t.double() / 3 for t in tensors), torch.zeros(4, 6, dtype=torch.float64))
    torch.testing.assert_close(merged.double(), exact, rtol=0, atol=1e-6)


def test_a_missing_row_of_coefficients_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        merge_weights(random_tensors(4, 6), torch.ones(2, 6))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_starts_at_the_weighted_average(name: str) -> None:
    coefficients = FORMS[name].starting_coefficients(5)
    expected = share_of(name).float()[:, None].expand(-1, 5)
    torch.testing.assert_close(coefficients, expected, rtol=0, atol=1e-7)
    assert coefficients.dtype == torch.float32


@pytest.mark.parametrize("name", FORMS)
def test_average_and_directions_reproduce_merge_weights(name: str) -> None:
    """`W_average + sum_u d_u T_u` is what the solver sees, merge_weights what is written."""
    form, tensors = FORMS[name], random_tensors(4, 6)
    unknowns = torch.randn(len(form.start), 6, dtype=torch.float64)
    written = merge_weights(tensors, form.coefficients(unknowns))
    step = unknowns - form.start[:, None]
    seen = form.average(tensors) + (form.directions(tensors) * step[:, None, :]).sum(0)
    torch.testing.assert_close(written.double(), seen, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", SUMMING)
def test_sum_to_one_holds_for_any_unknowns(name: str) -> None:
    form = FORMS[name]
    unknowns = torch.randn(len(form.start), 50, dtype=torch.float64)
    sums = form.coefficients(unknowns).double().sum(0)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", [0, 2])
@pytest.mark.parametrize("include_base", [False, True])
def test_the_base_takes_the_remainder(base: int, include_base: bool) -> None:
    form = Parametrisation.create(WEIGHTS, base=base, include_base=include_base, sum_to_one=True)
    unknowns = torch.tensor([[0.5, 0.0], [0.25, 0.0]], dtype=torch.float64)
    coefficients = form.coefficients(unknowns)
    others = [s for s in range(3) if s != base]
    assert coefficients[others].equal(unknowns.float())
    assert coefficients[base].tolist() == [0.25, 1.0]


def test_a_base_that_is_not_included_stays_out_of_the_free_form() -> None:
    form = Parametrisation.create(WEIGHTS, base=0, include_base=False, sum_to_one=False)
    coefficients = form.coefficients(torch.randn(2, 7, dtype=torch.float64))
    assert not coefficients[0].any()
    assert coefficients[1:].all()


def test_the_free_form_reaches_any_coefficients() -> None:
    form = Parametrisation.create(WEIGHTS, base=None, include_base=False, sum_to_one=False)
    unknowns = torch.randn(3, 4, dtype=torch.float64)
    assert form.coefficients(unknowns).equal(unknowns.float())


def test_the_affine_form_reaches_every_single_source() -> None:
    """Around the average, with no base: unknowns `e_s` give source s, bit for bit."""
    form = Parametrisation.create((1.0,) * 4, base=None, include_base=False, sum_to_one=True)
    for source in range(4):
        unknowns = torch.zeros(4, 1, dtype=torch.float64)
        unknowns[source] = 1
        assert form.coefficients(unknowns).squeeze(1).tolist() == [s == source for s in range(4)]


@pytest.mark.parametrize("name", SUMMING)
def test_forms_that_sum_to_one_keep_what_all_sources_agree_on(name: str) -> None:
    form = FORMS[name]
    (tensor,) = random_tensors(4, 6, count=1)
    unknowns = torch.randn(len(form.start), 6, dtype=torch.float64)
    merged = merge_weights([tensor] * 3, form.coefficients(unknowns))
    torch.testing.assert_close(merged, tensor, rtol=0, atol=2e-6)


def saved(folder: Path) -> CoefficientFile:
    file = CoefficientFile(
        coefficients={"a.weight": torch.randn(2, 5), "b.bias": torch.randn(2, 1)},
        sources=("org/a", "org/b"),
        metadata={"axes": {"a.weight": 0}, "versions": {"torch": "2"}, "seed": 3, "none": None},
    )
    file.save(folder / FILE_NAME)
    return file


@pytest.mark.parametrize("by", ["file", "folder"])
def test_save_and_load_are_inverse(tmp_path: Path, by: str) -> None:
    file = saved(tmp_path)
    loaded = CoefficientFile.load(tmp_path if by == "folder" else str(tmp_path / FILE_NAME))
    assert loaded.sources == file.sources
    assert loaded.metadata == file.metadata
    assert loaded.coefficients.keys() == file.coefficients.keys()
    for name, tensor in file.coefficients.items():
        assert loaded.coefficients[name].equal(tensor)


def test_coefficients_shared_by_tied_tensors_and_views_can_be_saved(tmp_path: Path) -> None:
    shared = torch.randn(2, 8)
    tensors = {
        "embed": shared,
        "head": shared,
        "strided": shared[:, ::2],
        "expanded": shared[:, :1],
    }
    CoefficientFile(tensors, ("a", "b"), {}).save(tmp_path / FILE_NAME)
    loaded = CoefficientFile.load(tmp_path)
    assert all(loaded.coefficients[name].equal(tensor) for name, tensor in tensors.items())


def test_problems_name_the_parameter_that_named_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"- start: no file at .*gone"):
        CoefficientFile.load(tmp_path / "gone", parameter="start")
    saved(tmp_path)
    file = CoefficientFile.load(tmp_path, parameter="start")
    with pytest.raises(ConfigError, match="- start: made from 2 models"):
        file.rows_of(["org/a"])


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write leaves the file of before, whole."""
    file = saved(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("mergekit_dam.coefficients.file.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        file.save(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_saving_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    saved(tmp_path / "new" / "folder")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [FILE_NAME]


def test_rows_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    assert saved(tmp_path).rows_of(["org/b", "org/a"]) == [1, 0]


def test_rows_are_found_by_position_when_names_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert saved(tmp_path).rows_of(["/ci/x", "/ci/y"]) == [0, 1]
    assert "/ci/x as org/a, /ci/y as org/b" in caplog.text


def test_another_number_of_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made from 2 models \(org/a, org/b\), got 1 \(org/a\)"):
        saved(tmp_path).rows_of(["org/a"])


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no file at .*{FILE_NAME}; give the path of a"):
        CoefficientFile.load(tmp_path)


@pytest.mark.parametrize("kind", ["no safetensors", "no sources", "no json", "text metadata"])
def test_a_file_that_dam_did_not_write_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "other.safetensors"
    tensors = {"a": torch.ones(1)}
    if kind == "no safetensors":
        path.write_bytes(b"not a header")
    elif kind == "no sources":
        save_file(tensors, path)
    elif kind == "no json":
        save_file(tensors, path, metadata={"sources": "[", "format": "pt"})
    else:  # what other tools write
        save_file(tensors, path, metadata={"format": "pt", "sources": json.dumps(["a"])})
    with pytest.raises(ConfigError, match=r"other\.safetensors was not written by a dam merge"):
        CoefficientFile.load(path)


@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.parametrize("sum_to_one", [False, True])
@pytest.mark.parametrize("base", [None, 0, 3])
def test_sources_that_are_left_out_have_no_coefficients(
    base: int | None, sum_to_one: bool, include_base: bool
) -> None:
    """The others have those that they would have without them."""
    weights, left_out = (1.0, 2.0, 5.0, 4.0), (0, 2)
    form = Parametrisation.create(
        weights, base=base, include_base=include_base, sum_to_one=sum_to_one, left_out=left_out
    )
    fewer = Parametrisation.create(
        (2.0, 4.0),
        base={3: 1}.get(base) if base is not None else None,
        include_base=include_base,
        sum_to_one=sum_to_one,
    )
    assert form.expand.shape[1] == fewer.expand.shape[1]
    unknowns = torch.randn(form.expand.shape[1], 5, generator=torch.Generator().manual_seed(0))
    coefficients = form.coefficients(unknowns)
    assert not coefficients[[0, 2]].any()
    assert torch.equal(coefficients[[1, 3]], fewer.coefficients(unknowns))
    assert set(form.reached) <= {1, 3}
    assert form.sums_to_one == fewer.sums_to_one


@pytest.mark.parametrize("base", [None, 0, 1])
@pytest.mark.parametrize("sum_to_one", [False, True])
def test_a_source_that_is_left_alone_is_taken_as_it_is(base: int | None, sum_to_one: bool) -> None:
    form = Parametrisation.create(
        (1.0, 0.0, 1.0), base=base, include_base=False, sum_to_one=sum_to_one, left_out=(0, 2)
    )
    assert form.reached == (1,)
    assert form.sums_to_one
    unknowns = torch.full((form.expand.shape[1], 2), 7.0)
    assert torch.equal(form.coefficients(unknowns), torch.tensor([[0.0] * 2, [1.0] * 2, [0.0] * 2]))
