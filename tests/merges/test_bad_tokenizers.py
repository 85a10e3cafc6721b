"""Bad tokenizers: each is refused before a weight is read."""

import json
import shutil

import pytest

from mergekit_dam.errors import CalibrationError
from tests.kit.inputs import Inputs


class TestTokenizers:
    def test_missing(self, inputs: Inputs) -> None:
        model = inputs.own_model()
        for file in model.glob("tokenizer*"):
            file.unlink()
        inputs.refused(CalibrationError, f"the tokenizer of {model} cannot be loaded")

    def test_that_disagree(self, inputs: Inputs) -> None:
        model = inputs.own_model()
        file = model / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
        file.write_text(json.dumps(content))
        inputs.refused(
            CalibrationError,
            "their tokenizers disagree",
            f"{inputs.models[0]} and {model}: 2 tokens differ",
            "'cat' in one, 'dog' in the other",
        )

    def test_of_the_base_disagrees(self, inputs: Inputs) -> None:
        base = inputs.folder / "base"
        shutil.copytree(inputs.base, base)
        file = base / "tokenizer.json"
        file.write_text(file.read_text().replace('"cat"', '"lion"'))
        configuration = {**inputs.configuration(), "base_model": str(base)}
        inputs.refused(
            CalibrationError, "'lion' in one, 'cat' in the other", configuration=configuration
        )

    @pytest.mark.parametrize("number", [0, 1])
    def test_missing_of_a_union(self, inputs: Inputs, number: int) -> None:
        model = inputs.own_model(number)
        for file in model.glob("tokenizer*"):
            file.unlink()
        inputs.refused(
            CalibrationError,
            f"the tokenizer of {model} cannot be loaded",
            configuration={**inputs.configuration(), "tokenizer": {"source": "union"}},
        )

    def test_to_take_is_missing(self, inputs: Inputs) -> None:
        configuration = {
            **inputs.configuration(),
            "tokenizer": {"source": str(inputs.folder / "nothing")},
        }
        inputs.refused(
            CalibrationError,
            f"the tokenizer of {inputs.folder}/nothing cannot be loaded",
            configuration=configuration,
        )
