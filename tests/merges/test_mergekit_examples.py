"""The shapes of configurations in mergekit's examples and documentation."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit import merge_methods

from mergekit_dam.errors import ConfigError
from mergekit_dam.request.method import DamMerge
from tests.kit.families import Family
from tests.kit.merging import SMALL, merge

Config = dict[str, Any]


def of(family: Family, text: str) -> Config:
    """A configuration in which A, B, C and BASE stand for models, as a user would have it."""
    for name, model in zip("ABC", family.models.models, strict=True):
        text = re.sub(rf"\b{name}\b", str(model), text)
    config: Config = yaml.safe_load(text.replace("BASE", str(family.models.base)))
    return config


def with_text(family: Family, config: Config) -> Config:
    """The same with the method dam, and text for every model but the base."""
    config = copy.deepcopy(config)
    config["merge_method"] = "dam"
    config["parameters"] = {**SMALL, **config.get("parameters", {})}
    for entry, model in entries(config):
        if model != config.get("base_model"):
            text = family.texts[list(map(str, family.models.models)).index(model)]
            entry.setdefault("parameters", {})["calibration"] = str(text)
    return config


def entries(config: Config) -> list[tuple[Config, str]]:
    found = list(config.get("models", []))
    for entry in config.get("slices", []):
        found += entry["sources"]
    return [(entry, entry["model"]) for entry in found]


def told(config: Config, family: Family, out: Path) -> tuple[Config, set[str]]:
    """Do what the one error says; the configuration then, and the parameters removed."""
    with pytest.raises(ConfigError) as caught:
        merge(config, out)
    assert not out.exists()
    config, removed = copy.deepcopy(config), set()
    for problem in caught.value.problems:
        found = re.search(r"`(\w+)` is a parameter of .*, not of dam; remove it$", problem)
        if found is None:
            assert "set `include_base: true` at top level" in problem
            config["parameters"] |= {"include_base": True, "calibration": str(family.texts[3])}
            continue
        name = found[1]
        removed.add(name)
        scopes = [config, *(entry for entry, _ in entries(config)), *config.get("slices", [])]
        holding = [scope["parameters"] for scope in scopes if name in scope.get("parameters", {})]
        assert problem.count(" (") == len(holding)  # every place is named
        for parameters in holding:
            del parameters[name]
    return config, removed


AS_IT_IS = {
    "linear: models with weights": """
        models:
          - {model: A, parameters: {weight: 1.0}}
          - {model: B, parameters: {weight: 0.3}}
          - {model: C, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float16
    """,
    "passthrough: a stack of two models' layers": """
        slices:
          - sources: [{model: A, layer_range: [0, 2]}]
          - sources: [{model: B, layer_range: [1, 3]}]
        merge_method: passthrough
        dtype: float16
    """,
    "passthrough: the first layers of one model": """
        slices:
          - sources: [{model: A, layer_range: [0, 2]}]
        merge_method: passthrough
        dtype: float16
    """,
    "layershuffle: single layers of several models": """
        slices:
          - sources: [{model: B, layer_range: [0, 1]}]
          - sources: [{model: A, layer_range: [1, 2]}]
          - sources: [{model: C, layer_range: [2, 3]}]
        merge_method: passthrough
        dtype: bfloat16
    """,
    "model_stock: models and a base, no parameters": """
        models: [{model: A}, {model: B}, {model: C}]
        base_model: BASE
        merge_method: model_stock
        chat_template: chatml
    """,
    "karcher: two models, no base": """
        models: [{model: A}, {model: B}]
        merge_method: karcher
        tokenizer_source: union
    """,
    "a weight at top level": """
        models: [{model: A}, {model: B}]
        merge_method: linear
        parameters: {weight: 0.5}
    """,
}

AS_TOLD: dict[str, tuple[str, set[str]]] = {
    "ties: gradients and filters": (
        """
        models:
          - {model: A, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: B, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
          - model: C
            parameters:
              density: 0.33
              weight: [{filter: mlp, value: 0.5}, {value: 0}]
        merge_method: ties
        base_model: BASE
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
        {"density", "normalize", "int8_mask"},
    ),
    "ties: two models and a base that is not listed": (
        """
        models:
          - {model: A, parameters: {density: 0.5, weight: 0.5}}
          - {model: B, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: BASE
        parameters: {normalize: false, int8_mask: true}
        dtype: float16
        """,
        {"density", "normalize", "int8_mask"},
    ),
    "slerp: slices, and t by filter and gradient": (
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 3]}
              - {model: B, layer_range: [0, 3]}
        merge_method: slerp
        base_model: A
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: float16
        """,
        {"t"},
    ),
    "slerp: one model, and a base that is not listed": (
        """
        models: [{model: A}]
        merge_method: slerp
        base_model: BASE
        parameters: {t: 0.5}
        """,
        {"t"},
    ),
    "arcee_fusion: the base is one of two models": (
        """
        models: [{model: A}, {model: B}]
        merge_method: arcee_fusion
        base_model: A
        dtype: bfloat16
        """,
        set(),
    ),
    "a method of one's own: weights and a switch": (
        """
        merge_method: weighted_average
        models:
          - {model: A, parameters: {weight: 0.3}}
          - {model: B, parameters: {weight: 0.7}}
        parameters: {normalize: true}
        """,
        {"normalize"},
    ),
    "dare_ties: as an evolution writes it, slice by slice": (
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 2], parameters: {weight: 0.4, density: 0.9}}
              - {model: B, layer_range: [0, 2], parameters: {weight: 0.2, density: 0.8}}
              - {model: BASE, layer_range: [0, 2]}
          - sources:
              - {model: A, layer_range: [2, 3], parameters: {weight: 0.1, density: 0.5}}
              - {model: B, layer_range: [2, 3], parameters: {weight: 0.6, density: 0.4}}
              - {model: BASE, layer_range: [2, 3]}
        merge_method: dare_ties
        base_model: BASE
        parameters: {normalize: 1.0, int8_mask: 1.0, rescale: true, lambda: 0.9}
        dtype: bfloat16
        tokenizer_source: base
        """,
        {"density", "normalize", "int8_mask", "rescale", "lambda"},
    ),
    "passthrough: a scale by filter": (
        """
        models:
          - model: A
            parameters:
              scale: [{filter: o_proj, value: 0}, {value: 1}]
        merge_method: passthrough
        """,
        {"scale"},
    ),
}


def _names(method: merge_methods.MergeMethod | type[DamMerge]) -> set[str]:
    return {parameter.name for parameter in method.spec.parameters}


class TestExamples:
    """The shapes of the configurations in mergekit's examples and documentation."""

    @pytest.mark.parametrize("name", AS_IT_IS)
    def test_works_as_it_is(self, family: Family, tmp_path: Path, name: str) -> None:
        merged = merge(with_text(family, of(family, AS_IT_IS[name])), tmp_path / "out")
        merged.load()
        assert all(tensor.isfinite().all() for tensor in merged.tensors.values())

    @pytest.mark.parametrize("name", AS_TOLD)
    def test_works_once_it_is_as_the_error_says(
        self, family: Family, tmp_path: Path, name: str
    ) -> None:
        text, foreign = AS_TOLD[name]
        config = with_text(family, of(family, text))
        mended, removed = told(config, family, tmp_path / "out")
        assert removed == foreign
        merged = merge(mended, tmp_path / "out")
        merged.load()
        assert all(tensor.isfinite().all() for tensor in merged.tensors.values())

    @pytest.mark.parametrize(
        "method",
        [m for m in merge_methods.registered_methods() if _names(m) - _names(DamMerge)],
        ids=lambda method: method.spec.name,
    )
    def test_every_parameter_of_every_other_method_is_refused_by_name(
        self, family: Family, tmp_path: Path, method: merge_methods.MergeMethod
    ) -> None:
        names, own = _names(method), _names(DamMerge)
        config = with_text(family, of(family, AS_IT_IS["a weight at top level"]))
        config["parameters"] |= dict.fromkeys(names - own, 0.5)
        mended, removed = told(config, family, tmp_path / "out")
        assert removed == names - own
        assert names - removed <= {"weight"}  # the same in both
        assert not removed & mended["parameters"].keys()
