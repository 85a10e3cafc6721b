"""A merge of anything else starts afresh, and says why."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mergekit_dam.host import resume
from mergekit_dam.host.report import versions
from tests.kit.merging import Merged, merge
from tests.kit.models import Models
from tests.kit.resuming import Stopped, Told, configured, watched
from tests.kit.texts import Calibration, save_calibration


@pytest.fixture
def configuration(llama_models: Models, calibration: Calibration) -> dict[str, Any]:
    return configured(llama_models, calibration, "layer, identity")


@pytest.fixture
def stopped(configuration: dict[str, Any], tmp_path: Path) -> Path:
    """The output of a merge that was stopped in its second block."""
    with pytest.raises(Stopped), watched("block 2/2"):
        merge(configuration, tmp_path / "out")
    return tmp_path / "out"


def again(configuration: dict[str, Any], out: Path, **options: Any) -> tuple[Merged, Told]:
    with watched() as told:
        merged = merge(configuration, out, **options)
    assert not any(out.parent.glob(".dam-*"))
    return merged, told


def with_parameters(configuration: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {**configuration, "parameters": {**configuration["parameters"], **parameters}}


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a parameter": ({"samples": 5}, {}, "`samples` changed"),
    "a parameter of tensors": ({"ridge": 0.02}, {}, "the configuration changed"),
    "another kind of fit": ({"metric": "sensitivity"}, {}, "`metric` changed"),
    "a seed by option": ({}, {"random_seed": 1}, "`seed` changed"),
    "an option": ({}, {"lazy_unpickle": True}, "--lazy-unpickle changed"),
    "afresh, as asked for": ({"resume": False}, {}, "`resume` is false"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_starts_afresh(
    change: str,
    configuration: dict[str, Any],
    stopped: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parameters, options, said = CHANGES[change]
    _, told = again(with_parameters(configuration, **parameters), stopped, **options)
    assert f"not continued: {said}" in caplog.text
    assert not told.continued


def test_other_text_starts_afresh(
    llama_models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [save_calibration(tmp_path / f"{k}.jsonl", seed=k, offset=12 * k) for k in range(2)]
    configuration = configured(llama_models, (texts[0], texts[1]), "layer, identity")
    with pytest.raises(Stopped), watched("block 2/2"):
        merge(configuration, tmp_path / "out")
    save_calibration(texts[1], seed=5, offset=12)
    _, told = again(configuration, tmp_path / "out")
    assert f"not continued: the calibration of {llama_models.models[1]} changed" in caplog.text
    assert not told.continued


def test_a_model_file_that_was_written_again_starts_afresh(
    configuration: dict[str, Any],
    stopped: Path,
    llama_models: Models,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = llama_models.models[1] / "model.safetensors"
    os.utime(file)
    _, told = again(configuration, stopped)
    assert f"not continued: the files of {llama_models.models[1]} changed" in caplog.text
    assert not told.continued


@pytest.mark.parametrize("package", ["mergekit-dam", "mergekit", "torch", "transformers"])
def test_another_version_starts_afresh(
    package: str,
    configuration: dict[str, Any],
    stopped: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = {**versions(), package: "0.0.1"}
    with mock.patch.object(resume, "versions", return_value=found):
        _, told = again(configuration, stopped)
    assert f"not continued: the version of {package} changed" in caplog.text
    assert not told.continued


def test_states_in_another_form_start_afresh(
    configuration: dict[str, Any], stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (stopped.parent / ".dam-out" / "kept" / "depends_on.json").write_text("{")
    _, told = again(configuration, stopped)
    assert "not continued: the form of what is kept changed" in caplog.text
    assert not told.continued


def test_where_things_are_kept_meanwhile_does_not_matter(
    configuration: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    """A merge that ran out of memory continues with parameters that let it need less."""
    expected = merge(configuration, tmp_path / "whole" / "out")
    asked = with_parameters(configuration, stream_offload="disk")
    merged, told = again(asked, stopped)
    assert told.continued == ["continuing: 1 of 2 blocks were fitted before"]
    assert merged.model_bytes == expected.model_bytes


def test_afresh_means_that_nothing_is_kept_either(
    configuration: dict[str, Any], tmp_path: Path
) -> None:
    asked = with_parameters(configuration, resume=False)
    with pytest.raises(Stopped), watched("output"):
        merge(asked, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_provenance_does_not_tell_whether_it_may_continue(
    configuration: dict[str, Any], tmp_path: Path
) -> None:
    merged = [
        merge(with_parameters(configuration, resume=own), tmp_path / str(own))
        for own in (True, False)
    ]
    one, other = (own.coefficient_bytes for own in merged)
    assert one == other
    assert all("resume" not in json.dumps(own.report["parameters"]) for own in merged)


def test_a_refused_configuration_leaves_what_is_kept(
    configuration: dict[str, Any], stopped: Path
) -> None:
    with pytest.raises(Exception, match="smaples"):
        merge(with_parameters(configuration, smaples=3), stopped)
    _, told = again(configuration, stopped)
    assert told.continued
