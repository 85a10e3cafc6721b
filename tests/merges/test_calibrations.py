"""Whole merges of mixed text, with the report of what was read."""

from pathlib import Path

from mergekit_dam.evaluation.evaluation import evaluate
from mergekit_dam.evaluation.settings import EvaluationSettings
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration


def test_a_merge_of_mixed_and_shared_text_reports_every_source(
    llama_models: Models, calibration: Calibration, tmp_path: Path, caplog
) -> None:
    first, second = map(str, calibration)
    mixed = [f"{first}:share=0.25", {"path": second, "type": "completion", "split": "train"}]
    config = dam(
        llama_models.models,
        each=[{"calibration": mixed}],
        base=llama_models.base,
        samples=8,
        calibration=[first, f"{second}:samples=3"],
    )
    merged = merge(config, tmp_path / "out")
    own, shared = merged.report["calibration"].values()
    assert [(part["source"], part["sequences"]) for part in own["parts"]] == [
        (f"{calibration[0].name}:share=0.25", 2),
        (f"{calibration[1].name}:format=text", 6),
    ]
    assert [part["sequences"] for part in shared["parts"]] == [8, 3]
    assert (own["sequences"], shared["sequences"]) == (8, 11)
    assert own["read_as"] == "text, 64 documents; text, 64 documents"
    evaluate([str(merged.path)], [calibration[0]], EvaluationSettings(sequence_length=16))
    assert f"{calibration[0].stem}: " in caplog.text
    assert f"with which {merged.path} was merged; that loss is no measure" in caplog.text
