"""Bad configurations of a whole merge: each is refused before a weight is read."""

from typing import Any

import pytest

from mergekit_dam.errors import ConfigError
from tests.kit.inputs import Inputs
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
    def test_parameters(self, inputs: Inputs, parameters: dict[str, Any], message: str) -> None:
        inputs.refused(ConfigError, message, configuration=inputs.configuration(**parameters))

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
        self, inputs: Inputs, parameters: dict[str, Any], message: str
    ) -> None:
        configuration = inputs.configuration(objective="logits", **parameters)
        inputs.refused(ConfigError, message, configuration=configuration)

    def test_a_start_that_weights_put_out_of_reach(self, inputs: Inputs) -> None:
        configuration = inputs.configuration(
            objective="logits", nonlinearity="tanh", sum_to_one=False
        )
        configuration["models"][1]["parameters"]["weight"] = 0
        inputs.refused(
            ConfigError,
            "model.embed_tokens.weight: nonlinearity: tanh can only give coefficients between -1 "
            "and 1, got one that starts at 1",
            configuration=configuration,
        )

    def test_a_start_of_another_form(self, inputs: Inputs) -> None:
        merge(inputs.configuration(granularity="column"), inputs.folder / "first")
        configuration = inputs.configuration(
            objective="logits", start=str(inputs.folder / "first"), granularity="tensor"
        )
        inputs.refused(
            ConfigError,
            "start: the file has one coefficient per column for model.",
            "but `granularity` is `tensor`; set `granularity: column`, or another start",
            configuration=configuration,
        )

    def test_a_start_of_other_models(self, inputs: Inputs) -> None:
        merge(inputs.configuration(), inputs.folder / "first")
        configuration = inputs.configuration(objective="logits", start=str(inputs.folder / "first"))
        configuration["base_model"] = str(inputs.base)
        inputs.refused(
            ConfigError, "start: made from 2 models", "got 3", configuration=configuration
        )

    def test_all_problems_are_reported_together(self, inputs: Inputs) -> None:
        configuration = inputs.configuration(sampels=4, ridge=-1)
        configuration["models"][0]["parameters"]["granularity"] = "tensor"
        inputs.refused(
            ConfigError,
            "3 problems in the dam configuration",
            "`sampels`",
            "`ridge` is -1",
            f"models[0] ({inputs.models[0]}): `granularity` belongs to the merged tensor",
            configuration=configuration,
        )

    def test_missing_calibration(self, inputs: Inputs) -> None:
        inputs.texts[1] = None
        inputs.refused(
            ConfigError, f"{inputs.models[1]}: required `calibration`", "add `parameters:"
        )

    def test_parameters_of_a_base_that_is_not_merged(self, inputs: Inputs) -> None:
        inputs.models.append(inputs.base)
        inputs.texts.append(inputs.texts[0])
        configuration = {**inputs.configuration(), "base_model": str(inputs.base)}
        inputs.refused(
            ConfigError,
            "the base takes no `calibration`; set `include_base: true`",
            configuration=configuration,
        )

    def test_a_model_listed_twice(self, inputs: Inputs) -> None:
        inputs.models[1] = inputs.models[0]
        inputs.refused(ConfigError, f"models: {inputs.models[0]} is listed 2 times")

    def test_nothing_but_the_base(self, inputs: Inputs) -> None:
        configuration = {"merge_method": "dam", "base_model": str(inputs.base)}
        configuration |= {"models": [{"model": str(inputs.base)}]}  # type: ignore[dict-item]
        inputs.refused(
            ConfigError,
            "1 problem in the dam configuration",
            "required at least one model besides the base",
            configuration=configuration,
        )

    def test_slices_of_models_without_the_base(self, inputs: Inputs) -> None:
        configuration = inputs.configuration()
        models = configuration.pop("models")
        both = [{**entry, "layer_range": [0, 1]} for entry in models]
        base = {"model": str(inputs.base), "layer_range": [0, 1]}
        configuration["base_model"] = str(inputs.base)
        configuration["slices"] = [{"sources": [*both, base]}, {"sources": both}]
        inputs.refused(
            ConfigError,
            f"slices[1]: {inputs.models[0]} and {inputs.models[1]} are merged without the base",
            configuration=configuration,
        )

    def test_coefficients_that_no_dam_merge_wrote(self, inputs: Inputs) -> None:
        path = inputs.models[0] / "model.safetensors"
        inputs.refused(
            ConfigError,
            f"coefficients: {path} was not written by a dam merge",
            configuration=inputs.configuration(coefficients=str(path)),
        )
        inputs.refused(
            ConfigError,
            f"start: {path} was not written by a dam merge",
            configuration=inputs.configuration(objective="logits", start=str(path)),
        )
