"""`dam_report.json`, read as typed data."""

import json
from pathlib import Path

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.reports.schema import Correction, Tensor, Text, parse, read
from tests.kit.reports import SOURCES, report_values


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = report_values(2)
    file = tmp_path / "dam_report.json"
    file.write_text(json.dumps(values), "utf-8")
    report = read(file)
    assert report.sources == SOURCES
    assert [tensor.name for tensor in report.tensors] == [own["name"] for own in values["tensors"]]
    assert (
        report.tensors[2].coefficients["org/math"].mean
        == (values["tensors"][2]["coefficients"]["org/math"]["mean"])
    )
    assert report.calibration["org/german"].tokens_used == 16384


def test_the_result_is_the_last_trial_that_was_kept() -> None:
    report = parse(report_values(1), "file")
    assert report.start is not None
    assert report.start.name == "start"
    assert report.result is not None
    assert report.result.name == "layer, sensitivity"


def test_fields_of_later_and_of_earlier_versions_do_no_harm() -> None:
    values = report_values(1)
    values["of a later version"] = {"x": 1}
    values["tensors"][1]["of a later version"] = 3
    for key in ("held_out_tokens", "base_model", "left_out", "versions"):
        del values[key]
    for tensor in values["tensors"]:
        for spread in tensor["coefficients"].values():
            spread.pop("std", None)
    report = parse(values, "file")
    assert report.base_model is None
    assert report.tensors[1].coefficients["org/math"].std is None


def test_what_differs_from_run_to_run_may_stand_in_a_section_of_its_own() -> None:
    values = report_values(1)
    expected = parse(values, "file")
    search = [{k: v for k, v in own.items() if k != "seconds"} for own in values["search"]]
    this_run = {
        "seconds": values.pop("seconds"),
        "trial_seconds": [own["seconds"] for own in values["search"]],
        "tensor_seconds": {},
        "peak_memory_bytes": values.pop("peak_memory_bytes"),
    }
    assert parse({**values, "search": search, "this_run": this_run}, "file") == expected


def test_numbers_that_were_not_finite_are_unknown() -> None:
    values = report_values(1)
    values["search"][2]["held_out_kl"] = [None, 0.5, 0.5]
    values["search"][2]["mean_held_out_kl"] = None
    assert parse(values, "file").search[2].mean_held_out_kl is None


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"sources": ["a"]}', '{"tensors": []}'])
def test_another_file_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "dam_report.json"
    file.write_text(text, "utf-8")
    with pytest.raises(DamError, match=r"dam_report\.json: required the report of a dam merge"):
        read(file)


def test_a_report_of_other_models_than_its_sources_is_refused(tmp_path: Path) -> None:
    values = report_values(layers=1)
    values["sources"] = values["sources"][1:]
    (tmp_path / "dam_report.json").write_text(json.dumps(values), "utf-8")
    with pytest.raises(DamError, match="'org/python' is none of its sources"):
        read(tmp_path / "dam_report.json")


def test_a_report_whose_trials_judge_other_models_is_refused(tmp_path: Path) -> None:
    values = report_values(layers=1)
    values["search"][1]["held_out_kl"].pop()
    (tmp_path / "dam_report.json").write_text(json.dumps(values), "utf-8")
    with pytest.raises(DamError, match="its trials judge different numbers of models"):
        read(tmp_path / "dam_report.json")


def test_a_missing_file_is_told() -> None:
    with pytest.raises(DamError, match="no such file; name the folder of a dam merge"):
        read(Path("nowhere/dam_report.json"))


@pytest.mark.parametrize(
    ("fitted", "corrected", "after"),
    [(0.5, None, 0.5), (2.0, None, 1.0), (2.0, 0.8, 0.8), (0.5, 0.3, 0.3), (None, None, 1.0)],
)
def test_the_loss_afterwards_is_that_of_what_was_kept(
    fitted: float | None, corrected: float | None, after: float
) -> None:
    correction = Correction(held_out=corrected, held_out_start=1.0)
    tensor = Tensor(
        name="a",
        kind="linear",
        outcome="fitted end to end",
        held_out_start=1.0,
        held_out_fitted=fitted,
        correction=correction,
    )
    assert tensor.held_out_after == after


def test_the_share_of_a_correction_is_that_of_the_norms() -> None:
    assert Correction(norm=3.0, weight_norm=12.0).share == 0.25
    assert Correction(norm=3.0).share is None
    assert Correction(norm=3.0, weight_norm=0.0).share is None


def test_ranks_of_both_fits_add_up() -> None:
    assert Correction(outcome="low rank", rank=64, descended_rank=16).whole_rank == 80
    assert Correction(outcome="full", descended_rank=16).whole_rank == 0


def test_text_has_no_field_for_words() -> None:
    assert not {"text", "documents", "sentences", "written"} & Text.model_fields.keys()
