"""Weights of 4 bits, against bitsandbytes itself and the definition of the format."""

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.sources.quantised.find import find_quantised

library = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
pytestmark = pytest.mark.bitsandbytes

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def quantised(
    shape: tuple[int, int] = (24, 96), dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a quantised weight, and the weight that bitsandbytes makes of them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = library.quantize_4bit(weight, **{"quant_type": "nf4", **how})
    beside = {f"{NAME}.{name}": own for name, own in state.as_dict(packed=True).items()}
    return {NAME: codes, **beside}, library.dequantize_4bit(codes, state)


def read_from(tensors: dict[str, Tensor]) -> Tensor:
    """The weight `NAME` of a checkpoint with these tensors."""
    found = find_quantised([*tensors, "model.norm.weight"], {}, {"quant_method": "bitsandbytes"})
    assert list(found.weights) == [NAME]
    assert found.hidden == tensors.keys() - {NAME}
    own = found.weights[NAME]
    weight = own.weight(tensors.__getitem__)
    assert own.shape(tuple(tensors[NAME].shape), tensors.__getitem__) == tuple(weight.shape)
    return weight


def changed(tensors: dict[str, Tensor], **state: Any) -> dict[str, Tensor]:
    """The same tensors with another state."""
    own = {**json.loads(bytes(tensors[STATE].tolist())), **state}
    return {**tensors, STATE: torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8)}


class TestReading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_a_weight_is_what_bitsandbytes_makes_of_it(
        self, kind: str, nested: bool, dtype: torch.dtype
    ) -> None:
        how = {"quant_type": kind, "compress_statistics": nested}
        tensors, expected = quantised((40, 128), dtype, **how)
        weight = read_from(tensors)
        assert weight.dtype == dtype
        assert torch.equal(weight, expected)

    @pytest.mark.parametrize("shape", [(24, 96), (7, 10), (5, 3), (1, 2), (1, 1)], ids=str)
    def test_a_byte_has_two_codes_and_a_block_one_scale(self, shape: tuple[int, int]) -> None:
        tensors, _ = quantised(shape, blocksize=32)
        values, scales = tensors[f"{NAME}.quant_map"], tensors[f"{NAME}.absmax"]
        halves = [half for byte in tensors[NAME].flatten().tolist() for half in divmod(byte, 16)]
        count = shape[0] * shape[1]
        expected = torch.tensor([values[halves[i]] * scales[i // 32] for i in range(count)])
        assert torch.equal(read_from(tensors), expected.reshape(shape))

    def test_bytes_may_be_stored_in_any_dtype(self) -> None:
        tensors, expected = quantised()
        stored, _ = quantised(quant_storage=torch.bfloat16)
        assert stored[NAME].dtype == torch.bfloat16
        assert torch.equal(read_from(stored), expected)
        assert torch.equal(read_from(tensors), expected)


class TestRefused:
    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"shape": [10**9, 10**9]}, "has 500000000000000000 bytes of codes, not 1152"),
            ({"shape": [48, 96]}, "a shape of [48, 96] has 2304 bytes of codes, not 1152"),
            ({"shape": [-24, -96]}, "greater than 0"),
            ({"shape": None}, "shape"),
            ({"blocksize": 32}, "has 72 scales, not 36"),
            ({"blocksize": 0}, "blocksize"),
            ({"dtype": "load"}, "dtype"),
            ({"quant_type": "int4"}, "quant_type"),
        ],
        ids=str,
    )
    def test_a_state_that_does_not_fit_its_codes(self, state: dict, message: str) -> None:
        with pytest.raises(ArchitectureError) as error:
            read_from(changed(quantised()[0], **state))
        assert message in str(error.value)
        assert NAME in str(error.value)

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"a": NaN}'])
    def test_a_state_that_is_no_json(self, text: bytes) -> None:
        state = torch.tensor(list(text), dtype=torch.uint8)
        with pytest.raises(ArchitectureError, match="does not say how it was quantised"):
            read_from({**quantised()[0], STATE: state})

    def test_scales_of_scales_that_are_too_few_of_another_dtype_or_not_described(self) -> None:
        tensors, _ = quantised(compress_statistics=True)
        cut = tensors[f"{NAME}.nested_quant_map"][:8]
        with pytest.raises(ArchitectureError, match="256 values of a scale, not 8"):
            read_from({**tensors, f"{NAME}.nested_quant_map": cut})
        half = {name: tensors[f"{NAME}.{name}"].half() for name in ("absmax", "nested_absmax")}
        for name, own in half.items():
            with pytest.raises(ArchitectureError, match=f"`{name}` is torch.float16"):
                read_from({**tensors, f"{NAME}.{name}": own})
        with pytest.raises(ArchitectureError, match="how its scales were quantised"):
            read_from(changed(tensors, nested_offset=None))

    @pytest.mark.parametrize("missing", [STATE, f"{NAME}.quant_map"])
    def test_codes_without_all_that_belongs_to_them(self, missing: str) -> None:
        tensors, _ = quantised()
        del tensors[missing]
        with pytest.raises(ArchitectureError, match=r"bitsandbytes, 4 bit, without"):
            read_from(tensors)

    def test_without_the_library_the_message_says_how_to_install_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
        with pytest.raises(ArchitectureError, match=r"pip install 'mergekit-dam\[bitsandbytes\]'"):
            find_quantised(quantised()[0], {}, None)
