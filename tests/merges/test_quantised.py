"""Merges of quantised models, against merges of the same weights written plainly."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kit.merging import dam, merge, refused, tensors_of
from tests.kit.models import Models
from tests.kit.quantised import (
    awq_words,
    four_bit,
    four_bit_twin,
    needs_bitsandbytes,
    packed,
    packed_twin,
)
from tests.kit.texts import Calibration

SETTINGS = {"quant_method": "fp8", "weight_block_size": [8, 8]}


def fp8(model: Path, folder: Path) -> tuple[Path, Path]:
    """A model with codes of 8 bits and scales, and the plain model that they stand for."""
    weights = tensors_of(model)
    stored, plain = dict(weights), dict(weights)
    for name in [name for name in weights if "_proj" in name]:
        scale = (
            weights[name]
            .abs()
            .amax()
            .reshape(1, 1)
            .expand(*(-(-size // 8) for size in weights[name].shape))
        )
        scale = scale / 448 * torch.linspace(1, 2, scale.numel()).reshape(scale.shape)
        spread = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
        spread = spread[: weights[name].shape[0], : weights[name].shape[1]]
        stored[name] = (weights[name] / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.contiguous()
        plain[name] = stored[name].float() * spread
    return save(model, folder / "fp8", stored, SETTINGS), save(model, folder / "plain", plain, None)


def save(model: Path, folder: Path, tensors: dict, settings: dict | None) -> Path:
    """A copy of a model with other tensors."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nf4(model: Path, folder: Path) -> tuple[Path, Path]:
    stored = four_bit(model, folder / "nf4", nested=True)
    return stored, four_bit_twin(stored, folder / "plain")


def int4(model: Path, folder: Path) -> tuple[Path, Path]:
    how = {"num_bits": 4, "strategy": "group", "group_size": 8}
    stored = packed(model, folder / "int4", ignore=("lm_head",), **how)
    return stored, packed_twin(stored, folder / "plain")


def awq(model: Path, folder: Path) -> tuple[Path, Path]:
    weights = tensors_of(model)
    stored, plain = dict(weights), dict(weights)
    for name in [name for name in weights if "_proj" in name]:
        weight = stored.pop(name).T
        scales = weight.unflatten(0, (-1, 8)).abs().amax(1) / 7
        spread = scales.repeat_interleave(8, 0)
        codes = (weight / spread).round()
        module = name.removesuffix(".weight")
        stored |= {f"{module}.qweight": awq_words(codes + 8), f"{module}.scales": scales}
        plain[name] = (codes * spread).T.contiguous()
    settings = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": False}
    return save(model, folder / "awq", stored, settings), save(model, folder / "plain", plain, None)


@pytest.fixture(params=[fp8, pytest.param(nf4, marks=needs_bitsandbytes), int4, awq])
def pair(request: pytest.FixtureRequest, llama_models: Models, tmp_path: Path) -> tuple[Path, Path]:
    """A quantised model, and the plain model that it stands for."""
    own: tuple[Path, Path] = request.param(llama_models.models[0], tmp_path)
    return own


@pytest.mark.parametrize("first", [True, False])
def test_a_quantised_model_is_merged_as_the_weights_that_it_stands_for(
    pair: tuple[Path, Path],
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    first: bool,
) -> None:
    written = []
    for model in pair:
        models = [model, llama_models.models[1]]
        configuration = dam(models if first else models[::-1], calibration)
        merged = merge(configuration, tmp_path / f"out-{model.name}")
        assert "quantization_config" not in merged.load().config.to_dict()
        written.append(merged.model_bytes)
    assert written[0] == written[1]


def test_a_leftover_section_on_plain_weights_does_not_reach_the_output(
    llama_models: Models, calibration: Calibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(llama_models.models[0] / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model = save(llama_models.models[0], tmp_path / "leftover", weights, settings)
    merged = merge(dam([model, llama_models.models[1]], calibration), tmp_path / "out")
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text("utf-8"))
    assert "left over" in caplog.text
    expected = merge(dam(llama_models.models[:2], calibration), tmp_path / "expected")
    assert merged.model_bytes == expected.model_bytes


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        pytest.param(nf4, "bitsandbytes.functional", "bitsandbytes", marks=needs_bitsandbytes),
        (int4, "compressed_tensors.quantization", "compressed-tensors"),
    ],
)
def test_without_the_library_of_a_format_the_message_says_how_to_install_it(
    make: Any,
    module: str,
    extra: str,
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored, _ = make(llama_models.models[0], tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    configuration = dam([stored, llama_models.models[1]], calibration)
    refused(configuration, tmp_path / "out", str(stored), f"'mergekit-dam[{extra}]'")


def test_packed_weights_are_refused_by_name(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    weights = tensors_of(llama_models.models[0])
    weights["model.layers.0.mlp.up_proj.qweight"] = weights.pop(
        "model.layers.0.mlp.up_proj.weight"
    ).to(torch.int32)
    model = save(llama_models.models[0], tmp_path / "gptq", weights, {"quant_method": "gptq"})
    configuration = dam([model, llama_models.models[1]], calibration)
    refused(configuration, tmp_path / "out", str(model), "gptq", "quantised")


def test_a_gguf_file_is_refused_by_name(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    file = tmp_path / "m" / "m-q4.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    for model in (file, file.parent):
        configuration = dam([model, llama_models.models[1]], calibration)
        refused(configuration, tmp_path / "out", str(model), "GGUF file m-q4.gguf", "gguf_file=")
