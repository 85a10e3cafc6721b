"""The entry in mergekit's registry."""

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_tensors
from mergekit.merge_methods.base import BasePolicy, ParameterScope
from pydantic import ValidationError

from mergekit_dam.errors import DamError
from mergekit_dam.parameters import (
    NAME,
    LogitsParameters,
    ModelParameters,
    RunParameters,
    TensorParameters,
)
from mergekit_dam.request.help import HEADINGS, SCOPES, fields, parameter_help, parameter_tables
from mergekit_dam.request.method import DamMerge


def test_mergekit_knows_the_method() -> None:
    method = merge_methods.get(NAME)
    assert isinstance(method, DamMerge)
    assert method.spec.reference_url == "https://arxiv.org/abs/2410.08371"
    assert method.spec.contract.base == BasePolicy.OPTIONAL


@pytest.mark.parametrize("name", [name for _, name, _ in fields()])
def test_every_parameter_has_help_that_is_a_sentence(name: str) -> None:
    description = next(f.description for _, n, f in fields() if n == name)
    assert description
    assert description[0].isupper()
    assert description.endswith(".")


def test_names_are_unique_over_all_scopes() -> None:
    names = [name for _, name, _ in fields()]
    assert len(set(names)) == len(names)


def test_the_spec_holds_every_parameter_with_its_default_and_scope() -> None:
    specs = {spec.name: spec for spec in DamMerge.spec.parameters}
    assert list(specs) == [name for _, name, _ in fields()]
    for owner, name, field in fields():
        spec = specs[name]
        expected = ParameterScope.INPUT if owner is ModelParameters else ParameterScope.SHARED
        assert spec.scope == expected
        assert spec.default == field.default
        assert spec.validate(spec.default) == field.default
        assert not spec.required


@pytest.mark.parametrize("owner", SCOPES)
def test_defaults_are_valid_and_unknown_parameters_are_not(owner: type) -> None:
    assert owner()
    with pytest.raises(ValidationError, match="Extra inputs"):
        owner(unknown=1)


def test_constraints_of_a_field_are_those_of_its_spec() -> None:
    specs = {spec.name: spec for spec in DamMerge.spec.parameters}
    for name, bad in (
        ("ridge", 0),
        ("samples", 0),
        ("holdout", 1),
        ("weight", -1),
        ("seed", -1),
        ("steps", 0),
        ("objective", "heads"),
        ("granularity", "row"),
    ):
        with pytest.raises(ValidationError):
            specs[name].validate(bad)
    assert specs["ridge"].validate("1e-3") == 1e-3
    assert specs["seed"].validate(None) is None


def test_the_table_of_parameters_shows_types_and_defaults() -> None:
    rows = {row.name: row for row in parameter_help()}
    assert rows["ridge"].type == "float"
    assert rows["ridge"].default == str(TensorParameters().ridge)
    assert rows["granularity"].type == "`column` or `tensor`"
    assert rows["calibration"].type == "str"
    assert rows["calibration"].default == ""
    assert rows["sum_to_one"].default == "true"
    assert rows["samples"].default == str(RunParameters().samples)
    assert rows["objective"].type == "`layer` or `logits` or `layer+logits`"


def test_every_parameter_is_in_one_table() -> None:
    rows = parameter_help()
    assert [row.name for row in rows] == [name for _, name, _ in fields()]
    assert {row.table for row in rows} == HEADINGS.keys()
    for row in rows:
        assert parameter_tables().count(f"\n| `{row.name}` | {row.type} | {row.default} |") == 1


def test_the_table_of_the_logits_has_the_parameters_that_layer_fits_do_not_read() -> None:
    in_table = {row.name for row in parameter_help() if row.table == "logits"}
    assert in_table == LogitsParameters.model_fields.keys()


@pytest.mark.parametrize("name", ["some.weight", None])
def test_a_single_tensor_is_refused_with_the_ways_in(name: str | None) -> None:
    with pytest.raises(DamError) as caught:
        merge_tensors([torch.ones(2, 2), torch.zeros(2, 2)], NAME, name=name)
    message = str(caught.value)
    assert ("cannot fit the single tensor" + (f" {name!r}. " if name else ". ")) in message
    for way in ("mergekit-yaml", "mergekit-multi", "run_merge", "mergekit-dam merge"):
        assert way in message
