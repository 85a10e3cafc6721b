"""What merges write to be looked at: the page and the card, and the numbers in the report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

from mergekit_dam.coefficients.correction import Corrections
from mergekit_dam.reports.page import render
from mergekit_dam.reports.schema import DamReport, read
from mergekit_dam.reports.summary import summary_of
from tests.kit.merging import HELD_OUT, Merged, dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration

CHECKOUT = Path(__file__).parents[2]

DESCENT: dict[str, Any] = {"samples": 8, "holdout": 0.5, "steps": 8}
"""A descent that comes nearer to the models than layer fits: enough text judges it."""


@pytest.fixture(scope="module")
def searched(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    """A merge by a search, with corrections and a descent."""
    configuration = dam(
        llama_models.models,
        calibration,
        base=llama_models.base,
        objective="layer+logits",
        metric="sensitivity",
        correction="low_rank",
        correction_rank=2,
        **DESCENT,
    )
    return merge(configuration, tmp_path_factory.mktemp("searched") / "out")


def report_of(merged: Merged) -> DamReport:
    return read(merged.path / "dam_report.json")


def page_of(merged: Merged) -> str:
    return (merged.path / "dam_report.html").read_text("utf-8")


def test_the_page_is_that_of_the_report(merged: Merged, searched: Merged) -> None:
    for own in (merged, searched):
        assert page_of(own) == render(report_of(own), "out")


def test_the_page_names_no_folder(
    searched: Merged, calibration: Calibration, llama_models: Models
) -> None:
    html = page_of(searched)
    assert str(llama_models.base.parent) not in html
    for text in calibration:
        assert text.name in html
        assert str(text.parent) not in html


def test_the_file_has_a_line_for_every_tensor(merged: Merged) -> None:
    lines = (merged.path / "dam_report.json").read_text("utf-8").splitlines()
    named = [line for line in lines if line.startswith('  {"name": ')]
    assert [json.loads(line.rstrip(","))["name"] for line in named] == list(merged.entries)
    assert len(lines) < len(named) + 65


def test_deviations_are_those_of_the_coefficients(merged: Merged) -> None:
    saved = merged.coefficients
    for name, entry in merged.entries.items():
        for source, row in zip(saved.sources, saved.coefficients[name], strict=True):
            expected = row.double().std(correction=0).item()
            assert entry["coefficients"][source]["std"] == pytest.approx(expected, abs=1e-9)


def test_held_out_tokens_and_the_base_are_told(merged: Merged, llama_models: Models) -> None:
    report = report_of(merged)
    assert report.base_model == llama_models.base.name
    length = next(iter(report.calibration.values())).sequence_length
    expected = {model.name: HELD_OUT * length for model in llama_models.models}
    assert report.held_out_tokens == expected


def test_the_document_names_all_that_the_report_holds(searched: Merged, merged: Merged) -> None:
    document = (CHECKOUT / "examples/report.md").read_text("utf-8")
    for own in (searched, merged):
        keys = {*own.report, *(key for entry in own.report["tensors"] for key in entry)}
        keys |= {key for entry in own.report["tensors"] for key in entry.get("correction", {})}
        assert keys - {"name", "kind"} <= set(re.findall(r"`(\w+)`", document))


def dense(path: Path, name: str) -> Tensor:
    """The whole correction of a weight, multiplied out."""
    correction = Corrections.of_file(path / "dam_corrections.safetensors").get(name)
    assert correction is not None
    total = torch.zeros(())
    if correction.full is not None:
        total = total + correction.full.double()
    for left, right in correction.pairs:
        total = total + left.double() @ right.double()
    return total


def test_sizes_are_those_of_the_corrections_on_disk(searched: Merged) -> None:
    names = {
        key.rpartition(".")[0] for key in load_file(searched.path / "dam_corrections.safetensors")
    }
    told = {t.name: t.correction for t in report_of(searched).tensors if t.correction is not None}
    assert names
    for name in names:
        correction = told[name]
        assert correction is not None
        assert correction.norm == pytest.approx(dense(searched.path, name).norm().item(), rel=1e-4)
        if correction.weight_norm is not None:
            weight = searched.tensors[name].double().norm().item()
            assert correction.weight_norm == pytest.approx(weight, rel=0.2)


def test_losses_of_the_layer_fit_stay_with_tensors_that_were_fitted_end_to_end(
    searched: Merged,
) -> None:
    ended = [t for t in report_of(searched).tensors if t.outcome == "fitted end to end"]
    linears = [tensor for tensor in ended if tensor.kind == "linear"]
    assert linears
    for tensor in linears:
        assert tensor.held_out_start is not None
        assert tensor.held_out_after is not None
        assert tensor.held_out_after <= tensor.held_out_start


def test_the_card_has_the_losses_of_the_search(searched: Merged) -> None:
    card = ModelCard((searched.path / "README.md").read_text("utf-8"))
    for own in summary_of(report_of(searched)).domains:
        name = Path(own.model).name
        assert own.before is not None
        assert own.after is not None
        assert f"| {name} | {own.before:.4f} | {own.after:.4f} |" in card.text


def test_the_card_has_no_path_and_its_metadata_no_local_model(
    searched: Merged, llama_models: Models
) -> None:
    text = (searched.path / "README.md").read_text("utf-8")
    folder = str(llama_models.base.parents[2])
    assert folder not in text
    assert not re.search(r"[\s(\"'](/[\w.-]+){2,}", text.split("# out", 1)[1].replace("://", ""))
    data = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in data
    assert data["base_model_relation"] == "merge"


def test_without_a_card_neither_it_nor_its_picture_is_written(
    configuration: dict[str, Any], tmp_path: Path
) -> None:
    written = merge(configuration, tmp_path / "out", write_model_card=False).path
    names = {path.name for path in written.iterdir()}
    assert not {"README.md", "dam_coefficients.svg"} & names
    assert "dam_report.html" in names


def test_a_replay_says_so(searched: Merged, llama_models: Models, tmp_path: Path) -> None:
    configuration = {
        "merge_method": "dam",
        "base_model": str(llama_models.base),
        "models": [{"model": str(model)} for model in llama_models.models],
        "parameters": {"coefficients": str(searched.path)},
    }
    replayed = merge(configuration, tmp_path / "out")
    said = "Coefficients were replayed from the file of an earlier merge"
    assert said in page_of(replayed)
    assert said in (replayed.path / "README.md").read_text("utf-8")
