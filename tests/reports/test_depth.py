"""Numbers by layer and module, and the summary, against sums by hand."""

from typing import Any

import numpy as np
import pytest

from mergekit_dam.reports.depth import (
    coefficient_map,
    corrected_modules,
    correction_map,
    grid_of,
    leaders,
    losses_by_layer,
    mean_by_layer,
)
from mergekit_dam.reports.schema import parse
from mergekit_dam.reports.summary import summary_of
from tests.kit.reports import MODULES, SOURCES, outside, report_values, tensor

LINEARS = [k for k, module in enumerate(MODULES) if "norm" not in module]


def entry(values: dict[str, Any], layer: int, module: int) -> dict[str, Any]:
    name = f"model.layers.{layer}.{MODULES[module]}.weight"
    found: dict[str, Any] = next(own for own in values["tensors"] if own["name"] == name)
    return found


def test_the_map_has_every_mean_at_its_place() -> None:
    values = report_values(3)
    report = parse(values, "file")
    grid = grid_of(report)
    assert (grid.layers, grid.modules) == ((0, 1, 2), MODULES)
    maps = coefficient_map(report, grid)
    for source in SOURCES:
        for m in range(len(MODULES)):
            for layer in range(3):
                cell = maps[source][m][layer]
                assert cell is not None
                expected = entry(values, layer, m)["coefficients"][source]["mean"]
                assert cell.spread.mean == expected
                assert bool(cell.kept) == (m not in LINEARS)


def test_layers_in_any_order_are_sorted_and_gaps_stay_empty() -> None:
    values = report_values(1)
    values["tensors"] = [tensor(SOURCES, 10, 1), tensor(SOURCES, 2, 1), tensor(SOURCES, 2, 2)]
    report = parse(values, "file")
    grid = grid_of(report)
    assert grid.layers == (2, 10)
    rows = coefficient_map(report, grid)["org/math"]
    assert [[cell is not None for cell in row] for row in rows] == [[True, True], [True, False]]


def test_the_decoder_is_the_stack_that_was_learned() -> None:
    values = report_values(2)
    for k in range(50):
        tower = outside(SOURCES, f"visual.blocks.{k}.attn.qkv.weight", "other")
        values["tensors"].append({**tower, "outcome": "averaged: outside of the decoder"})
    grid = grid_of(parse(values, "file"))
    assert grid.layers == (0, 1)
    assert len(grid.elsewhere) == 50
    assert [own.name for own in grid.outside] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_experts_of_a_module_are_joined_as_their_columns_would_be() -> None:
    draws = np.random.default_rng(0).normal(size=(3, 40))
    values = report_values(1, ("a", "b"))
    values["tensors"] = [
        {
            "name": f"model.layers.0.mlp.experts.{k}.w1.weight",
            "kind": "linear",
            "outcome": "fitted",
            "coefficients": {
                "a": {"mean": row.mean(), "std": row.std(), "min": row.min(), "max": row.max()}
            },
        }
        for k, row in enumerate(draws)
    ]
    report = parse(values, "file")
    ((cell,),) = coefficient_map(report, grid_of(report))["a"]
    assert cell is not None
    assert cell.spread.std is not None
    assert cell.spread.mean == pytest.approx(draws.mean())
    assert cell.spread.std == pytest.approx(draws.std())
    assert (cell.spread.min, cell.spread.max) == (draws.min(), draws.max())


def test_means_by_layer_leave_out_what_keeps_the_average() -> None:
    values = report_values(2)
    report = parse(values, "file")
    means = mean_by_layer(coefficient_map(report, grid_of(report))["org/math"])
    for layer in range(2):
        own = [entry(values, layer, m)["coefficients"]["org/math"]["mean"] for m in LINEARS]
        assert means[layer] == pytest.approx(sum(own) / len(own))


def test_the_leader_of_a_layer_has_the_largest_mean_and_the_base_is_none() -> None:
    report = parse(report_values(1), "file")
    means: dict[str, list[float | None]] = {
        "org/python": [0.5, 0.1, None],
        "org/german": [0.4, 0.2, None],
        "org/math": [0.1, 0.1, 0.9],
        "org/base": [0.9, 0.9, 0.1],
    }
    led = leaders(report, means, [0, 1, 2])
    assert led == {"org/python": (0,), "org/german": (1,)}


def test_a_base_with_text_of_its_own_may_lead() -> None:
    values = report_values(1)
    values["calibration"]["org/base"] = {}
    means: dict[str, list[float | None]] = {
        source: [0.9 if source == "org/base" else 0.1] for source in SOURCES
    }
    assert leaders(parse(values, "file"), means, [0]) == {"org/base": (0,)}


def test_losses_of_a_layer_are_means_over_its_fitted_tensors() -> None:
    values = report_values(2)
    (first, second) = losses_by_layer(grid_of(parse(values, "file")))
    assert (first.layer, second.layer) == (0, 1)
    entries = [entry(values, 1, m) for m in LINEARS]
    assert second.tensors == len(LINEARS)
    assert second.before == pytest.approx(np.mean([own["held_out_start"] for own in entries]))
    kept = [own["correction"]["held_out"] for own in entries]
    assert second.after == pytest.approx(np.mean(kept))
    assert second.fit_before == pytest.approx(np.mean([own["loss_start"] for own in entries]))
    assert second.fit_after == pytest.approx(np.mean([own["loss_fitted"] for own in entries]))


def test_a_loss_on_the_text_of_the_fit_that_is_known_of_some_tensors_alone_is_left_out() -> None:
    values = report_values(1)
    del entry(values, 0, 1)["loss_start"]
    (own,) = losses_by_layer(grid_of(parse(values, "file")))
    assert own.fit_before is None
    assert own.before > 0


def test_corrections_are_shares_of_their_weights() -> None:
    values = report_values(2)
    grid = grid_of(parse(values, "file"))
    assert corrected_modules(grid) == tuple(MODULES[m] for m in LINEARS)
    for m, row in zip(LINEARS, correction_map(grid), strict=True):
        for layer, share in enumerate(row):
            own = entry(values, layer, m)["correction"]
            assert share == pytest.approx(own["norm"] / own["weight_norm"])


def test_the_summary_counts_what_keeps_the_average_and_why() -> None:
    values = report_values(2)
    for m, outcome in (
        (1, "start kept: held-out loss was not better"),
        (2, "averaged, as configured"),
    ):
        own = entry(values, 0, m)
        own["outcome"] = outcome
    entry(values, 1, 1)["correction"] = {"outcome": "dropped: held-out loss was not better"}
    entry(values, 1, 2)["experts"] = {"start kept: no held-out token was sent to it": [3, 5]}
    summary = summary_of(parse(values, "file"))
    assert summary.kept == {
        "all models have the same weights there": 4,
        "what was learned was no better on held-out text": 1,
        "the configuration says so": 1,
    }
    assert summary.experts == {"no held-out token was sent to it": 2}
    assert (summary.tensors, summary.learned) == (20, 14)
    assert summary.uncorrected == 1


def test_the_summary_compares_the_start_with_the_result() -> None:
    summary = summary_of(parse(report_values(1), "file"))
    assert [(own.before, own.after) for own in summary.domains] == [
        (0.9, 0.5),
        (1.3, 0.6),
        (1.8, 0.7),
    ]
    assert summary.mean is not None
    assert summary.mean.left == pytest.approx(0.6 / (4 / 3))
    assert [own.tokens for own in summary.domains] == [2048] * 3
