"""Packed integers, against compressed-tensors itself and the definition of the format."""

import sys
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.sources.quantised.find import Quantisation, find_quantised

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 24, 96


def scheme(**weights: Any) -> dict[str, Any]:
    """A group of linears as a configuration describes it."""
    return {"targets": ["Linear"], "weights": {"type": "int", **weights}}


def settings(*schemes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The section of a configuration."""
    groups = {f"group_{index}": own for index, own in enumerate(schemes)}
    form = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**form, "config_groups": groups, **more}


def compressed(own: dict[str, Any], module: str = MODULE) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a packed weight with random codes, and the weight that they stand for."""
    args = QuantizationArgs(**own["weights"])
    random = torch.Generator().manual_seed(0)
    count = COLUMNS // args.group_size if args.group_size else 1
    low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1)
    codes = torch.randint(low, high, (ROWS, COLUMNS), generator=random)
    scale = torch.rand((ROWS, count), generator=random) + 0.5
    zero = torch.randint(low, high, (ROWS, count), generator=random)
    if args.symmetric:
        zero.zero_()
    group = torch.arange(COLUMNS) * count // COLUMNS
    weight = (codes - zero[:, group]) * scale[:, group]
    plain = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    packed = PackedQuantizationCompressor.compress(
        plain, QuantizationScheme(targets=["Linear"], weights=args)
    )
    return {f"{module}.{name}": own for name, own in packed.items()}, weight


def found_in(tensors: dict[str, Tensor], own: dict[str, Any] | None) -> Quantisation:
    names = {torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.float32: "F32"}
    return find_quantised(tensors, {n: names[t.dtype] for n, t in tensors.items()}, own)


def read_from(tensors: dict[str, Tensor], own: dict[str, Any]) -> Tensor:
    """The one weight of a checkpoint with these tensors."""
    found = found_in(tensors, own)
    assert list(found.weights) == [f"{MODULE}.weight"]
    assert found.hidden == tensors.keys()
    packed = found.weights[f"{MODULE}.weight"]
    weight = packed.weight(tensors.__getitem__)
    shape = packed.shape(tuple(tensors[packed.stored].shape), tensors.__getitem__)
    assert shape == tuple(weight.shape)
    return weight


GROUPS = scheme(num_bits=4, strategy="group", group_size=32)
ROWWISE = scheme(num_bits=8, strategy="channel")


class TestReading:
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("group", [None, 16, 32])
    def test_a_weight_is_its_code_less_the_zero_point_times_the_scale_of_its_group(
        self, group: int | None, bits: int, symmetric: bool
    ) -> None:
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        own = scheme(num_bits=bits, symmetric=symmetric, **strategy)
        tensors, weight = compressed(own)
        assert tensors.keys() >= {f"{MODULE}.weight_packed", f"{MODULE}.weight_shape"}
        assert torch.equal(read_from(tensors, settings(own)), weight)

    def test_of_several_schemes_the_one_that_fits_is_taken(self) -> None:
        wider = scheme(num_bits=4, strategy="group", group_size=48)
        zeros = scheme(num_bits=4, strategy="group", group_size=32, symmetric=False)
        schemes = (ROWWISE, wider, zeros, GROUPS)
        for own in schemes:
            tensors, weight = compressed(own)
            assert torch.equal(read_from(tensors, settings(*schemes)), weight)

    def test_packed_and_other_codes_may_be_in_one_checkpoint(self) -> None:
        tensors, weight = compressed(GROUPS)
        other = "model.layers.0.self_attn.q_proj.weight"
        tensors[other] = torch.full((2, 2), 3, dtype=torch.int8)
        tensors[f"{other}_scale"] = torch.full((2, 1), 0.5)
        found = found_in(tensors, settings(GROUPS, ROWWISE, format="mixed-precision"))
        read = {n: own.weight(tensors.__getitem__) for n, own in found.weights.items()}
        assert torch.equal(read[f"{MODULE}.weight"], weight)
        assert torch.equal(read[other], torch.full((2, 2), 1.5))
        assert found.hidden == tensors.keys() - {other}


class TestRefused:
    def test_a_configuration_without_schemes(self) -> None:
        tensors, _ = compressed(GROUPS)
        with pytest.raises(ArchitectureError, match=r"compressed-tensors, packed.*config_groups"):
            found_in(tensors, None)
        floats = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}
        with pytest.raises(ArchitectureError, match="no integers"):
            found_in(tensors, settings(floats))

    def test_a_scheme_that_the_library_does_not_read(self) -> None:
        own = scheme(num_bits=4, strategy="group", group_size=32, actorder="group")
        with pytest.raises(ArchitectureError, match="actorder='group' has been removed"):
            found_in(compressed(GROUPS)[0], settings(own))

    @pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_shape"])
    def test_shapes_that_do_not_fit(self, name: str) -> None:
        tensors, _ = compressed(GROUPS)
        whole = tensors[f"{MODULE}.{name}"]
        tensors[f"{MODULE}.{name}"] = whole[:, 1:] if whole.dim() > 1 else whole + 1
        with pytest.raises(ArchitectureError) as error:
            read_from(tensors, settings(GROUPS))
        assert "(4 bits, one scale per group of 32), got a shape of" in str(error.value)
        assert f"{MODULE}.weight_packed" in str(error.value)

    def test_without_the_library_the_message_says_how_to_install_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
        with pytest.raises(ArchitectureError) as error:
            found_in(compressed(GROUPS)[0], settings(GROUPS))
        assert "pip install 'mergekit-dam[compressed-tensors]'" in str(error.value)
