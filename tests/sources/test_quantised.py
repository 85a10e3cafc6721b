"""Codes and scales in checkpoints, against loops over blocks and the formats' own definitions."""

import pytest
import torch

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.sources.quantised.eight_bit import Codes, spread
from mergekit_dam.sources.quantised.find import find_quantised

NAME = "model.layers.0.mlp.up_proj.weight"


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read_from(tensors: dict[str, torch.Tensor], settings: dict | None = None) -> torch.Tensor:
    """The weight `NAME` of a checkpoint with these tensors."""
    names = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.float32: "F32",
    }
    dtypes = {name: names[tensor.dtype] for name, tensor in tensors.items()}
    found = find_quantised(tensors, dtypes, settings)
    assert found.hidden == tensors.keys() - {NAME}
    return found.weights[NAME].weight(tensors.__getitem__)


class TestReading:
    @pytest.mark.parametrize("block", [(128, 128), (64, 32)])
    @pytest.mark.parametrize("shape", [(256, 128), (200, 300)])
    def test_a_block_has_one_scale_and_the_last_may_be_cut(
        self, block: tuple[int, int], shape: tuple[int, int]
    ) -> None:
        stored = codes(*shape).to(torch.float8_e4m3fn)
        grid = [-(-size // step) for size, step in zip(shape, block, strict=True)]
        scale = codes(*grid, seed=1).abs()
        expected = torch.empty(shape)
        for row in range(shape[0]):
            for column in range(shape[1]):
                number = scale[row // block[0], column // block[1]]
                expected[row, column] = stored[row, column].float() * number
        settings = {"quant_method": "fp8", "weight_block_size": list(block)}
        weight = read_from({NAME: stored, f"{NAME}_scale_inv": scale}, settings)
        assert torch.equal(weight, expected)

    def test_one_scale_of_a_tensor_is_a_factor(self) -> None:
        stored = codes(6, 4).to(torch.float8_e4m3fn)
        extra = {NAME.replace("weight", "input_scale"): torch.ones(1)}
        weight = read_from({NAME: stored, f"{NAME}_scale": torch.tensor(0.3), **extra})
        assert torch.equal(weight, stored.float() * torch.tensor(0.3))

    @pytest.mark.parametrize("scales", [(6, 1), (6, 2), (6,)])
    def test_a_row_or_a_group_of_its_columns_has_one_scale(self, scales: tuple[int, ...]) -> None:
        stored = (codes(6, 8) * 50).to(torch.int8)
        scale = codes(*scales, seed=1).abs()
        by_group = scale.reshape(6, -1)
        width = 8 // by_group.shape[1]
        expected = torch.stack([stored[:, c] * by_group[:, c // width] for c in range(8)], dim=1)
        weight = read_from({NAME: stored, f"{NAME}_scale": scale})
        assert torch.equal(weight, expected)

    def test_zero_points_are_subtracted_before_scaling(self) -> None:
        stored = (codes(6, 8) * 50).to(torch.int8)
        scale, zero = codes(6, 1, seed=1).abs(), torch.arange(6).to(torch.int8).reshape(6, 1)
        tensors = {NAME: stored, f"{NAME}_scale": scale, f"{NAME}_zero_point": zero}
        expected = (stored.float() - zero.float()) * scale
        assert torch.equal(read_from(tensors), expected)

    def test_bitsandbytes_scales_are_the_largest_weights_of_the_rows(self) -> None:
        weight = codes(6, 8)
        largest = weight.abs().amax(1)
        stored = (weight / largest[:, None] * 127).round().to(torch.int8)
        beside = {
            NAME.replace("weight", "SCB"): largest,
            NAME + "_format": torch.zeros((), dtype=torch.uint8),
        }
        read = read_from({NAME: stored, **beside}, {"quant_method": "bitsandbytes"})
        assert ((read - weight).abs() <= largest[:, None] / 254 * 1.001).all()

    def test_scales_of_one_byte_are_powers_of_two(self) -> None:
        stored = codes(2, 64).to(torch.float8_e4m3fn)
        scale = torch.tensor([[127, 128], [126, 130]], dtype=torch.uint8)
        factors = torch.tensor([[1.0, 2.0], [0.5, 8.0]]).repeat_interleave(32, dim=1)
        settings = {"weight_block_size": [1, 32]}
        weight = read_from({NAME: stored, f"{NAME}_scale_inv": scale}, settings)
        assert torch.equal(weight, stored.float() * factors)

    def test_scales_of_another_shape_are_refused(self) -> None:
        with pytest.raises(ArchitectureError, match=r"\[7, 2\] do not fit codes of shape \[6, 8\]"):
            spread(torch.ones(7, 2), torch.Size([6, 8]), None)

    def test_pickled_codes_are_known_by_their_names(self) -> None:
        found = find_quantised([NAME, f"{NAME}_scale", "model.norm.weight"], {}, None)
        assert found.weights == {NAME: Codes(NAME, f"{NAME}_scale")}


class TestPlain:
    def test_integers_that_are_masks_and_floats_beside_others_are_plain(self) -> None:
        names = {"h.0.attn.bias": "U8", "a.weight": "F32", "a.weight_scale": "F32", "n": "I64"}
        found = find_quantised(names, names, {"quant_method": "gptq"})
        assert (found.weights, found.hidden) == ({}, frozenset())


PACKED = {
    "GPTQ or AWQ": {"a.qweight": "I32", "a.scales": "F16", "a.qzeros": "I32"},
    "bitsandbytes, 4 bit": {"a.weight": "U8", "a.weight.absmax": "F32"},
    "compressed-tensors, packed": {"a.weight_packed": "I32", "a.weight_scale": "F32"},
    "compressed-tensors, packed in another way": {
        "a.weight_packed": "U8",
        "a.weight_scale": "U8",
        "a.weight_shape": "I64",
    },
    "compressed-tensors, with reordered columns": {
        "a.weight_packed": "I32",
        "a.weight_scale": "F32",
        "a.weight_shape": "I64",
        "a.weight_g_idx": "I32",
    },
    "NVFP4": {"a.weight": "U8", "a.weight_scale": "F8_E4M3", "a.weight_scale_2": "F32"},
    "HQQ": {"a.W_q": "U8"},
    "quanto": {"a.weight._data": "U8", "a.weight._scale": "F32"},
    "compressed-tensors, sparse": {"a.compressed": "F16", "a.bitmask": "U8"},
    "MXFP4": {"a.down_proj_blocks": "U8", "a.down_proj_scales": "U8"},
    "F8_E4M3 without scales": {"a.weight": "F8_E4M3"},
    "I8 without scales": {"a.weight": "I8"},
}


class TestRefused:
    @pytest.mark.parametrize("named", PACKED)
    def test_packed_weights_are_refused_by_the_name_of_their_format(self, named: str) -> None:
        with pytest.raises(ArchitectureError, match=named) as error:
            find_quantised(PACKED[named], PACKED[named], None)
        assert "Merge the model that it was quantised from" in str(error.value)

    def test_rotated_weights_are_refused(self) -> None:
        names = {NAME: "F8_E4M3", f"{NAME}_scale": "F32"}
        settings = {"quant_method": "compressed-tensors", "transform_config": {"R1": {}}}
        with pytest.raises(ArchitectureError, match="rotates the weights"):
            find_quantised(names, names, settings)
