"""Bad configurations of a whole merge: each is refused before a weight is read."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_dam.errors import ConfigError
from tests.kit.cases import Case
from tests.kit.merging import merge


class TestConfiguration:
    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"sampels": 4}, "unknown parameter `sampels`; did you mean `samples`?"),
            ({"density": 0.5}, "`density` is a parameter of"),
            ({"samples": 0}, "`samples` is 0: input should be greater than 0"),
            ({"samples": [4, 8]}, "`samples` takes one value for the whole merge"),
            ({"ridge": 0}, "`ridge` is 0: input should be greater than 0"),
            ({"holdout": 1}, "`holdout` is 1: input should be less than 1"),
            (
                {"granularity": "row"},
                "`granularity` is 'row': input should be 'column' or 'tensor'",
            ),
            ({"include_base": True}, "`include_base` is true, but the configuration names no"),
            ({"weight": 0}, "every model has `weight: 0`"),
            (
                {"loss_weight": [{"filter": "mlp", "value": 0}, {"value": 1}]},
                "model.layers.0.mlp.up_proj.weight: every model has `loss_weight: 0`",
            ),
            ({"loss_weight": 0}, "every model has `loss_weight: 0`"),
            ({"coefficients": "gone"}, "coefficients: no file at gone"),
            ({"steps": 8}, "`objective: layer` takes no `steps`"),
        ],
    )
    def test_parameters(self, case: Case, parameters: dict[str, Any], message: str) -> None:
        case.refused(ConfigError, message, configuration=case.configuration(**parameters))

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"start": "avarage"}, "start: required `average`, `random`, or the path of"),
            ({"metric": "identity"}, "`objective: logits` takes no `metric`"),
            ({"weighted_overlap": 1}, "the configuration names no `base_model` to take task"),
            ({"nonlinearity": "sigmoid"}, "`nonlinearity: sigmoid` has no start"),
            (
                {"nonlinearity": "sigmoid", "sum_to_one": [{"filter": "mlp", "value": False}]},
                "model.embed_tokens.weight: nonlinearity: sigmoid can only give coefficients "
                "between 0 and 1, got one that starts at 0; use `nonlinearity: none`",
            ),
        ],
    )
    def test_parameters_of_the_objective_logits(
        self, case: Case, parameters: dict[str, Any], message: str
    ) -> None:
        configuration = case.configuration(objective="logits", **parameters)
        case.refused(ConfigError, message, configuration=configuration)

    def test_a_start_that_weights_put_out_of_reach(self, case: Case) -> None:
        configuration = case.configuration(
            objective="logits", nonlinearity="tanh", sum_to_one=False
        )
        configuration["models"][1]["parameters"]["weight"] = 0
        case.refused(
            ConfigError,
            "model.embed_tokens.weight: nonlinearity: tanh can only give coefficients between -1 "
            "and 1, got one that starts at 1",
            configuration=configuration,
        )

    def test_a_start_of_another_form(self, case: Case) -> None:
        merge(case.configuration(granularity="column"), case.folder / "first")
        configuration = case.configuration(
            objective="logits", start=str(case.folder / "first"), granularity="tensor"
        )
        case.refused(
            ConfigError,
            "start: the file has one coefficient a column for model.",
            "but `granularity` is `tensor`; set `granularity: column`, or another start",
            configuration=configuration,
        )

    def test_a_start_of_other_models(self, case: Case) -> None:
        merge(case.configuration(), case.folder / "first")
        configuration = case.configuration(objective="logits", start=str(case.folder / "first"))
        configuration["base_model"] = str(case.base)
        case.refused(ConfigError, "start: made from 2 models", "got 3", configuration=configuration)

    def test_every_problem_is_told_at_once(self, case: Case) -> None:
        configuration = case.configuration(sampels=4, ridge=-1)
        configuration["models"][0]["parameters"]["granularity"] = "tensor"
        case.refused(
            ConfigError,
            "3 problems in the dam configuration",
            "`sampels`",
            "`ridge` is -1",
            f"models[0] ({case.models[0]}): `granularity` belongs to the merged tensor",
            configuration=configuration,
        )

    def test_missing_calibration(self, case: Case) -> None:
        case.texts[1] = None
        case.refused(ConfigError, f"{case.models[1]}: required `calibration`", "add `parameters:")

    def test_parameters_of_a_base_that_is_not_merged(self, case: Case) -> None:
        case.models.append(case.base)
        case.texts.append(case.texts[0])
        configuration = {**case.configuration(), "base_model": str(case.base)}
        case.refused(
            ConfigError,
            "the base takes no `calibration`; set `include_base: true`",
            configuration=configuration,
        )

    def test_a_model_listed_twice(self, case: Case) -> None:
        case.models[1] = case.models[0]
        case.refused(ConfigError, f"models: {case.models[0]} is listed 2 times")

    def test_nothing_but_the_base(self, case: Case) -> None:
        configuration = {"merge_method": "dam", "base_model": str(case.base)}
        configuration |= {"models": [{"model": str(case.base)}]}  # type: ignore[dict-item]
        case.refused(
            ConfigError,
            "1 problem in the dam configuration",
            "required at least one model besides the base",
            configuration=configuration,
        )

    def test_slices_of_models_without_the_base(self, case: Case) -> None:
        configuration = case.configuration()
        models = configuration.pop("models")
        both = [{**entry, "layer_range": [0, 1]} for entry in models]
        base = {"model": str(case.base), "layer_range": [0, 1]}
        configuration["base_model"] = str(case.base)
        configuration["slices"] = [{"sources": [*both, base]}, {"sources": both}]
        case.refused(
            ConfigError,
            f"slices[1]: {case.models[0]} and {case.models[1]} are merged without the base",
            configuration=configuration,
        )

    def test_coefficients_that_no_dam_merge_wrote(self, case: Case) -> None:
        path = case.models[0] / "model.safetensors"
        case.refused(
            ConfigError,
            f"coefficients: {path} was not written by a dam merge",
            configuration=case.configuration(coefficients=str(path)),
        )
        case.refused(
            ConfigError,
            f"start: {path} was not written by a dam merge",
            configuration=case.configuration(objective="logits", start=str(path)),
        )
