"""Parameters of the objective that do not go together."""

import pytest

from mergekit_dam.parameters import LogitsParameters
from tests.kit.configurations import check, configuration, only_problem, problems

VALUES = {
    "optimizer": "mofo",
    "lr_schedule": "linear",
    "nonlinearity": "tanh",
    "start": "random",
    "warmup": "0.1",
    "mofo_fraction": "0.1",
}


@pytest.mark.parametrize("name", LogitsParameters.model_fields)
def test_parameters_of_the_end_to_end_fit_are_refused_without_it(name: str) -> None:
    given = f"{name}: {VALUES.get(name, '1')}"
    assert only_problem(configuration(parameters=f"{{objective: layer, {given}}}")) == (
        f"parameters (top level): `objective: layer` takes no `{name}`; set `objective: logits` or "
        f"`objective: layer+logits`, or remove it"
    )
    more = ", optimizer: mofo" if name == "mofo_fraction" else ""
    check(configuration(base="org/c", parameters=f"{{objective: logits, {given}{more}}}"))


def test_all_that_an_objective_does_not_read_is_one_problem() -> None:
    problem = only_problem(configuration(parameters="{objective: layer, steps: 8, l1: 0}"))
    assert "takes no `steps`, `l1`; set" in problem
    assert problem.endswith("or remove them")


def test_a_default_that_is_given_counts_as_given() -> None:
    steps = LogitsParameters().steps
    only_problem(configuration(parameters=f"{{objective: layer, steps: {steps}}}"))


@pytest.mark.parametrize("value", ["full", "[{filter: mlp, value: low_rank}, {value: none}]"])
def test_a_descent_alone_takes_corrections(value: str) -> None:
    check(configuration(parameters=f"{{objective: logits, correction: {value}}}"))


@pytest.mark.parametrize("more", ["correction: none", "correction: full, objective: layer"])
def test_a_rank_that_nothing_reads_is_refused(more: str) -> None:
    problem = only_problem(configuration(parameters=f"{{correction_rank: 8, {more}}}"))
    assert problem.startswith("`correction_rank` is read by `correction: low_rank`, and beside")


@pytest.mark.parametrize("more", ["correction: low_rank, objective: layer", "correction: full"])
def test_a_rank_is_read_by_factors(more: str) -> None:
    check(configuration(parameters=f"{{correction_rank: 8, {more}}}"))


def test_a_metric_without_layer_fits_is_refused() -> None:
    problem = only_problem(configuration(parameters="{objective: logits, metric: identity}"))
    assert problem == (
        "parameters (top level): `objective: logits` takes no `metric`, as it fits no layers; set "
        "`objective: layer+logits`, or remove it"
    )


def test_time_is_not_limited_where_one_sweep_is_all() -> None:
    one = "objective: layer, metric: identity"
    problem = only_problem(configuration(parameters=f"{{{one}, max_minutes: 5}}"))
    assert problem.startswith("parameters (top level): `objective: layer` with `metric: identity`")
    check(configuration(parameters="{objective: layer, max_minutes: 0.5}"))


@pytest.mark.parametrize("optimizer", ["", "optimizer: adamw, "])
def test_a_fraction_of_mofo_without_mofo_is_refused(optimizer: str) -> None:
    parameters = f"{{objective: logits, {optimizer}mofo_fraction: 0.5}}"
    assert only_problem(configuration(parameters=parameters)) == (
        "parameters (top level): `optimizer: adamw` takes no `mofo_fraction`; set `optimizer: "
        "mofo`, or remove it"
    )


def test_a_weighted_overlap_without_a_base_is_refused() -> None:
    parameters = "{objective: logits, weighted_overlap: '1e-2'}"
    assert only_problem(configuration(parameters=parameters)) == (
        "parameters (top level): `weighted_overlap` is 0.01, but the configuration names no "
        "`base_model` to take task vectors from; name one, or set `overlap`"
    )
    check(configuration(parameters="{objective: logits, weighted_overlap: 0}"))


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
def test_a_nonlinearity_after_layer_fits_is_refused(name: str) -> None:
    parameters = f"{{objective: layer+logits, nonlinearity: {name}}}"
    problem = only_problem(configuration(parameters=parameters, base="org/base"))
    assert problem.startswith(
        f"parameters (top level): `nonlinearity: {name}` cannot produce every coefficient that "
        f"the layer fits may find"
    )
    assert problem.endswith("set `objective: logits`, or `nonlinearity: none`")


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
@pytest.mark.parametrize("more", ["", ", sum_to_one: true", ", sum_to_one: [true, true]"])
def test_a_nonlinearity_that_cannot_give_deviations_from_the_average_is_refused(
    name: str, more: str
) -> None:
    parameters = f"{{objective: logits, nonlinearity: {name}{more}}}"
    problem = only_problem(configuration(parameters=parameters))
    assert problem.startswith(f"parameters (top level): `nonlinearity: {name}` has no start")
    assert "set `sum_to_one: false`, name a `base_model`, or take `tanh` or `none`" in problem


@pytest.mark.parametrize(
    ("more", "base"),
    [
        (", nonlinearity: sigmoid", "org/base"),
        (", nonlinearity: relu", "org/base"),
        (", nonlinearity: sigmoid, sum_to_one: false", None),
        (", nonlinearity: sigmoid, sum_to_one: [{filter: mlp, value: false}]", None),
        (", nonlinearity: tanh", None),
        (", nonlinearity: none", None),
    ],
)
def test_a_nonlinearity_that_may_have_a_start_is_accepted(more: str, base: str | None) -> None:
    check(configuration(parameters=f"{{objective: logits{more}}}", base=base))


def test_all_problems_of_an_objective_are_reported_together() -> None:
    parameters = (
        "{objective: logits, metric: identity, mofo_fraction: 1, weighted_overlap: 1, "
        "nonlinearity: relu, include_base: true, ridge: 0}"
    )
    found = problems(configuration(parameters=parameters))
    assert len(found) == 6


@pytest.mark.parametrize(
    "parameters",
    [
        "{objective: layers, steps: 3}",
        "{objective: logits, optimizer: mofu, mofo_fraction: 0.2}",
        "{objective: logits, weighted_overlap: -1}",
        "{objective: logits, nonlinearity: sigma}",
    ],
)
def test_of_a_parameter_with_a_wrong_value_nothing_follows_for_others(parameters: str) -> None:
    only_problem(configuration(parameters=parameters))


def test_a_replay_may_keep_the_parameters_of_its_merge() -> None:
    parameters = "{objective: logits, steps: 3, start: gone, coefficients: out}"
    assert check(configuration(parameters=parameters)).run.steps == 3


def test_a_replay_says_which_parameters_it_does_not_read(caplog: pytest.LogCaptureFixture) -> None:
    unread = "ridge: 7, correction: none, objective: layer, nonlinearity: tanh"
    check(configuration(parameters=f"{{coefficients: out, changed_models: allow, {unread}}}"))
    (said,) = caplog.messages
    assert "`ridge`, `correction`, `objective`, `nonlinearity` are not read" in said
    caplog.clear()
    check(configuration(parameters="{coefficients: out, other_weights: average, resume: false}"))
    assert not caplog.messages
