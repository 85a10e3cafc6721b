"""NaN and infinity in loaded and merged tensors: the model and the tensor are named."""

import pytest
import torch

from mergekit_dam.errors import CheckpointError, DamError
from mergekit_dam.sources.finite import require_finite, require_finite_merge

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loaded_tensor_that_is_not_finite_is_named_with_its_model(
    dtype: torch.dtype, value: float
) -> None:
    bad = torch.ones(40, 50, dtype=dtype)
    bad[7, 9] = bad[8, 0] = value
    loaded = {"v": {"org/a": torch.ones(3)}, "w": {"org/a": torch.ones(40, 50), "org/b": bad}}
    with pytest.raises(CheckpointError) as error:
        require_finite(loaded)
    assert f"org/b: w has 2 values that are not finite, the first ({value}) at [7, 9]" in str(
        error.value
    )
    assert ("`dtype: bfloat16`" in error.value.message) == (dtype == torch.float16)


def test_plus_and_minus_infinity_do_not_cancel() -> None:
    with pytest.raises(CheckpointError, match="has 2 values"):
        require_finite({"w": {"a": torch.tensor([float("inf"), float("-inf"), 1.0])}})


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_tensors_whose_sum_overflows_are_accepted(dtype: torch.dtype) -> None:
    require_finite({"w": {"a": torch.full((5,), torch.finfo(dtype).max, dtype=dtype)}})


def test_whole_numbers_and_empty_tensors_are_accepted() -> None:
    require_finite({"w": {"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(0)}, "v": {}})
    require_finite({})


def test_a_merged_tensor_beyond_its_dtype_is_refused_with_the_dtype() -> None:
    merged = torch.tensor([1.0, 70_000.0]).half()
    with pytest.raises(DamError, match=r"w: the merged tensor has 1 values .* fit in float16"):
        require_finite_merge("w", merged, {"a": torch.ones(2)})


def test_a_merged_tensor_of_a_bad_source_is_refused_by_the_name_of_the_source() -> None:
    merged = torch.tensor([1.0, float("nan")])
    with pytest.raises(CheckpointError, match=r"^a: w has 1 values"):
        require_finite_merge("w", merged, {"b": torch.ones(2), "a": merged})
