"""The benchmark of merges: the methods and the points of their parameters."""

import json

import pytest
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration

from examples.benchmarks.measuring.merges import Point, configuration
from examples.benchmarks.merge_quality.methods import REGMEAN, Choices, select
from examples.benchmarks.merge_quality.results import LINEAR
from mergekit_dam.errors import DamError


class TestMethods:
    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("has_base", [True, False])
    def test_every_parameter_of_a_grid_is_known_to_mergekit(self, count, has_base):
        """It ignores what it does not know: a typo would be a grid of equal merges."""
        models = {f"m{i}": f"/models/{i}" for i in range(count)}
        for method in select(Choices(), count=count, has_base=has_base, samples=4):
            for point in method.points:
                if point.method in (REGMEAN, "dam"):
                    continue
                spec = merge_methods.get(point.method).spec
                own = {"weight"} if point.weights else set()
                assert {*point.parameters, *own} <= {p.name for p in spec.parameters}
                config = MergeConfiguration.model_validate(
                    yaml.safe_load(yaml_of(point, models, base="/base" if has_base else None))
                )
                assert [str(entry.model) for entry in config.models or []] == [*models.values()]

    def test_points_of_a_grid_differ(self):
        for method in select(Choices(), count=3, has_base=True, samples=4):
            shown = [json.dumps(point.shown) for point in method.points]
            assert len(set(shown)) == len(shown) > 0

    def test_methods_follow_from_what_is_merged(self):
        def names(**of):
            return {method.name for method in select(Choices(), samples=4, **of)}

        assert {"slerp", "nuslerp"} <= names(count=2, has_base=True)
        assert not {"slerp", "nuslerp"} & names(count=3, has_base=True)
        without_base = names(count=3, has_base=False)
        assert {LINEAR, "karcher", REGMEAN, "reference", "dam"} <= without_base
        assert not {"ties", "task_arithmetic", "model_stock"} & without_base

    def test_rows_are_chosen_by_name_but_linear_always_runs(self):
        def names(**choices):
            found = select(Choices(**choices), count=3, has_base=True, samples=4)
            return [method.name for method in found]

        assert names(only=("dam",)) == [LINEAR, "dam"]
        assert names(only=("dare*", "ties"), skip=("*_ties",)) == [LINEAR, "ties", "dare_linear"]
        assert LINEAR in names(skip=("linear",))
        with pytest.raises(DamError, match="no row is named 'tise'; there are linear"):
            names(only=("tise",))

    def test_a_name_is_taken_once(self):
        with pytest.raises(DamError, match="a row named dam is there already"):
            select(Choices(variants={"dam": {}}), count=3, has_base=True, samples=4)

    def test_the_reference_sees_each_sample_once_by_default(self):
        def steps(choices):
            (found,) = (
                m
                for m in select(choices, count=3, has_base=True, samples=7)
                if m.name == "reference"
            )
            return found.points[0].parameters["steps"]

        assert steps(Choices()) == 7
        assert steps(Choices(reference_steps=90)) == 90

    def test_dam_gets_its_texts_and_others_their_weights(self):
        models = {"a": "/a", "b": "/b"}
        dam = yaml.safe_load(yaml_of(Point(method="dam", parameters={"ridge": 0.1}), models))
        assert dam["parameters"] == {"samples": 4, "sequence_length": 16, "ridge": 0.1}
        assert dam["models"][1] == {"model": "/b", "parameters": {"calibration": "b.jsonl"}}
        weighted = Point(method="linear", weights=(2.0, 1.0), base="none")
        linear = yaml.safe_load(yaml_of(weighted, models))
        assert linear["models"][0] == {"model": "/a", "parameters": {"weight": 2.0}}
        assert "base_model" not in linear
        assert weighted.shown == {"weight": "2:1"}


def yaml_of(point, models, base="/base"):
    return configuration(
        point,
        models,
        base=base,
        calibrations={name: f"{name}.jsonl" for name in models},
        samples=4,
        sequence_length=16,
        dtype="float32",
    )
