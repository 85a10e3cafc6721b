"""Bad tokenizers: each is refused before a weight is read."""

from __future__ import annotations

import json
import shutil

import pytest

from mergekit_dam.errors import CalibrationError
from tests.kit.cases import Case


class TestTokenizers:
    def test_missing(self, case: Case) -> None:
        model = case.own_model()
        for file in model.glob("tokenizer*"):
            file.unlink()
        case.refused(CalibrationError, f"the tokenizer of {model} cannot be loaded")

    def test_that_disagree(self, case: Case) -> None:
        model = case.own_model()
        file = model / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
        file.write_text(json.dumps(content))
        case.refused(
            CalibrationError,
            "their tokenizers disagree",
            f"{case.models[0]} and {model}: 2 tokens differ",
            "'cat' in one, 'dog' in the other",
        )

    def test_of_the_base_disagrees(self, case: Case) -> None:
        base = case.folder / "base"
        shutil.copytree(case.base, base)
        file = base / "tokenizer.json"
        file.write_text(file.read_text().replace('"cat"', '"lion"'))
        configuration = {**case.configuration(), "base_model": str(base)}
        case.refused(
            CalibrationError, "'lion' in one, 'cat' in the other", configuration=configuration
        )

    @pytest.mark.parametrize("number", [0, 1])
    def test_missing_of_a_union(self, case: Case, number: int) -> None:
        model = case.own_model(number)
        for file in model.glob("tokenizer*"):
            file.unlink()
        case.refused(
            CalibrationError,
            f"the tokenizer of {model} cannot be loaded",
            configuration={**case.configuration(), "tokenizer": {"source": "union"}},
        )

    def test_to_take_is_missing(self, case: Case) -> None:
        configuration = {
            **case.configuration(),
            "tokenizer": {"source": str(case.folder / "nothing")},
        }
        case.refused(
            CalibrationError,
            f"the tokenizer of {case.folder}/nothing cannot be loaded",
            configuration=configuration,
        )
