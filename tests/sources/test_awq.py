"""Weights of AWQ, against the definition of the format."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.sources.quantised.find import find_quantised
from tests.kit.quantised import awq_words

MODULE = "model.layers.0.mlp.up_proj"
OUT, IN, GROUP = 16, 64, 32
SETTINGS = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
}


def quantised() -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight with random codes, and the weight that they stand for."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (IN, OUT), generator=random)
    zeros = torch.randint(0, 16, (IN // GROUP, OUT), generator=random)
    scales = torch.rand((IN // GROUP, OUT), generator=random) + 0.5
    group = torch.arange(IN) // GROUP
    weight = ((codes - zeros[group]) * scales[group]).T
    stored = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    return {f"{MODULE}.{name}": own for name, own in stored.items()}, weight


def read_from(tensors: dict[str, Tensor], **settings: Any) -> Tensor:
    """The one weight of a checkpoint with these tensors."""
    found = find_quantised(tensors, {}, {**SETTINGS, **settings})
    assert list(found.weights) == [f"{MODULE}.weight"]
    assert found.hidden == tensors.keys()
    own = found.weights[f"{MODULE}.weight"]
    weight = own.weight(tensors.__getitem__)
    assert own.shape(tuple(tensors[own.stored].shape), tensors.__getitem__) == tuple(weight.shape)
    return weight


def test_a_weight_is_its_code_less_the_zero_point_times_the_scale_of_its_group() -> None:
    tensors, weight = quantised()
    assert torch.equal(read_from(tensors), weight)


def test_the_head_may_be_quantised_too() -> None:
    tensors, weight = quantised()
    head = {name.replace(MODULE, "lm_head"): own for name, own in tensors.items()}
    found = find_quantised(head, {}, SETTINGS).weights["lm_head.weight"]
    assert torch.equal(found.weight(head.__getitem__), weight)


@pytest.mark.parametrize("settings", [{"version": "gemv"}, {"bits": 8}, {"group_size": "x"}])
def test_another_kind_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match="AWQ"):
        read_from(quantised()[0], **settings)


def test_gptq_is_refused_although_its_tensors_have_the_same_names() -> None:
    with pytest.raises(ArchitectureError, match="GPTQ or AWQ"):
        read_from(quantised()[0], quant_method="gptq")


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    tensors, _ = quantised()
    tensors[f"{MODULE}.{name}"] = tensors[f"{MODULE}.{name}"][:, 1:].contiguous()
    with pytest.raises(ArchitectureError, match=rf"{MODULE}\.qweight: required a weight of AWQ"):
        read_from(tensors)


def test_codes_without_zero_points_are_refused() -> None:
    tensors, _ = quantised()
    del tensors[f"{MODULE}.qzeros"]
    with pytest.raises(ArchitectureError, match="AWQ"):
        read_from(tensors)


def test_without_the_library_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "compressed_tensors.entrypoints.convert.converters.autoawq"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArchitectureError, match=r"'mergekit-dam\[compressed-tensors\]'"):
        find_quantised(quantised()[0], {}, SETTINGS)
