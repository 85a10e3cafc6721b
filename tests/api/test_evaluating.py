"""`evaluate` from Python: the losses of the command, and comparisons."""

import json
from pathlib import Path
from typing import Any

import pytest

import mergekit_dam
from mergekit_dam import DamError

MODELS: dict[str, Any] = {
    "math": "models/math",
    "animals": Path("models/animals"),
    "merged": "merged",
}


def test_documents_in_memory_have_the_losses_of_the_same_file(folder: Path) -> None:
    lines = Path("math.jsonl").read_text("utf-8").splitlines()
    texts: Any = {"file": Path("math.jsonl"), "memory": [json.loads(own)["text"] for own in lines]}
    found = mergekit_dam.evaluate("models/math", texts, sequence_length=16)
    losses = found.losses["models/math"]
    assert losses["file"] == losses["memory"]
    assert found.texts == {"file": "math.jsonl", "memory": f"{len(lines)} documents in memory"}


def test_recovery_is_one_for_the_specialist_and_nothing_for_the_baseline(folder: Path) -> None:
    texts: Any = {"math": "math.jsonl"}
    losses = mergekit_dam.evaluate(MODELS, texts, sequence_length=16).losses
    best, *_, worst = sorted(MODELS, key=lambda name: losses[name]["math"])
    found = mergekit_dam.evaluate(
        MODELS, texts, baseline=worst, references={"math": best}, sequence_length=16
    )
    recovered = [found.recovery(name)["math"] for name in (best, worst)]
    assert [own and own.value for own in recovered] == [1.0, 0.0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"models": []}, "at least one, got none"),
    "a model that is not there": ({"models": "models/absent"}, "models/absent"),
    "no such baseline": ({"baseline": "other"}, "baseline: required one of"),
    "a reference of no text": ({"references": {"german": "x"}}, "there is no text 'german'"),
    "references alone": ({"references": {"math": "models/math"}}, "`baseline`"),
    "no text at all": ({"texts": {}}, "texts: required at least one, got none"),
    "no text": ({"texts": {"math": []}}, "0 without a word"),
    "a text that is not there": ({"texts": {"math": "absent.jsonl"}}, "absent.jsonl"),
    "a model's own text": ({"texts": {"math": "self"}}, "judges nothing"),
    "no setting": ({"length": 3}, "no setting length"),
    "no device": ({"device": "nonsense"}, "nonsense"),
}


@pytest.mark.parametrize("given", REFUSED, ids=str)
def test_what_is_wrong_is_a_dam_error(given: str, folder: Path) -> None:
    arguments, message = REFUSED[given]
    usual: dict[str, Any] = {"models": "models/math", "texts": {"math": "math.jsonl"}}
    with pytest.raises(DamError) as error:
        mergekit_dam.evaluate(**{**usual, **arguments})
    assert message in str(error.value)
