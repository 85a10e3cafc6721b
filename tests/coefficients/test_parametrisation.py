"""The map from unknowns to coefficients."""

import pytest
import torch

from mergekit_dam.coefficients.merge import merge_weights
from mergekit_dam.coefficients.parametrisation import Parametrisation
from tests.kit.forms import FORMS, SUMMING, WEIGHTS, random_tensors, share_of


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
