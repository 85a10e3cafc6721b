"""Trials of a search: the best is kept."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.coefficients.record import MergeRecord, Trial
from mergekit_dam.journal import Journal
from mergekit_dam.layers import sweep as sweep_module
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.search import backprop as backprop_module
from mergekit_dam.search import descents as descents_module
from mergekit_dam.search import judge as judge_module
from mergekit_dam.search import search as search_module
from mergekit_dam.search import survey as survey_module
from mergekit_dam.search.best import Best
from mergekit_dam.search.descend import Descent
from mergekit_dam.search.judge import Verdict, verdict_of
from mergekit_dam.search.search import layer_sweep
from mergekit_dam.search.survey import judged_start, survey
from mergekit_dam.streams.boundaries import BoundaryStates
from tests.kit.networks import make
from tests.kit.searches import searched


def test_a_layer_sweep_that_is_worse_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = fit_stage

    def ruin(opened: Any, streams: Any, record: MergeRecord, **rest: Any) -> Any:
        result = stock(opened, streams, record, **rest)
        for stream in streams:
            stream.merged = -stream.merged if opened.stage.kind == "block" else stream.merged
        return result

    monkeypatch.setattr(sweep_module, "fit_stage", ruin)
    made = make()
    record = searched(made, tmp_path, objective="layer", metric="sensitivity")
    kept = {trial.name: trial.kept for trial in record.trials}
    assert kept.pop("start")
    assert kept
    assert not any(kept.values())
    start = made.average()
    for name, rows in record.coefficients.items():
        assert rows.equal(start.coefficients[name])


@pytest.mark.parametrize(
    ("loss", "kept"), [(0.9, True), (1.0, False), (1.1, False), (math.nan, False)]
)
def test_the_best_is_kept(loss: float, kept: bool, tmp_path: Path) -> None:
    start, other = MergeRecord(), MergeRecord()
    first = Trial("start", True, (1.0, 1.0), 1.0, 0.0)
    best = Best(start, Verdict((1.0, 1.0), (1.0, 2.0)), [first], Journal(tmp_path, keeps=False))
    verdict = Verdict((loss, loss), (1.0, 2.0))
    best.consider("another", other, verdict, 0.0, steps=3)
    assert best.record is (other if kept else start)
    assert (best.verdict is verdict) == kept
    _, trial = best.trials
    assert (trial.name, trial.kept, trial.details) == ("another", kept, {"steps": 3})
    assert trial.held_out_kl == verdict.losses


def test_the_mean_of_a_verdict_is_by_loss_weights() -> None:
    assert Verdict((1.0, 4.0), (1.0, 0.5)).mean == pytest.approx(2.0)


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
def test_a_search_in_memory_is_never_worse_than_its_start(metric: Any, tmp_path: Path) -> None:
    made = make("gpt2")
    record = searched(made, tmp_path, metric=metric)
    data = made.data(9, 3)
    start, *rest = record.trials
    found = verdict_of(made.network(), record, data)
    kept = [trial.mean_held_out_kl for trial in record.trials if trial.kept]
    assert kept == sorted(kept, reverse=True)
    assert found.mean == pytest.approx(kept[-1], rel=1e-4)
    assert found.mean < start.mean_held_out_kl
    assert {trial.name for trial in rest if trial.kept}
    assert record.coefficients.keys() == made.weights[0].keys()
    assert record.axes["transformer.h.0.mlp.c_fc.weight"] == 0


@pytest.mark.parametrize("layers", [True, False], ids=["layer sweep", "survey"])
def test_the_teachers_of_a_search_are_the_models(layers: bool, tmp_path: Path) -> None:
    made = make("llama-tied")
    network, streams, start = made.network(), made.streams(), made.average()
    journal = Journal(tmp_path, keeps=False)
    surveyed = survey(network, streams, start, BoundaryStates(tmp_path), teachers=not layers)
    taught = surveyed.taught
    if layers:
        assert not taught
        taught = layer_sweep(network, streams, start, None, journal).streams
    best, data = judged_start(network, streams, surveyed, taught, journal)
    for own, expected in zip(data, made.data(), strict=True):
        torch.testing.assert_close(own.teacher, expected.teacher, rtol=1e-4, atol=1e-5)
        assert own.merged[:].equal(expected.merged[:])
        assert (own.source, own.share) == (expected.source, expected.share)
    assert best.verdict.mean == pytest.approx(verdict_of(network, start, data).mean, rel=1e-4)


@pytest.mark.parametrize(("factor", "descents"), [(0.5, 2), (0.98, 2), (0.995, 1), (1.5, 1)])
def test_a_long_descent_follows_a_short_one_that_paid(
    factor: float, descents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, asked = [], []

    def fake(_: Any, data: Any, start: MergeRecord, verdict: Verdict, **rest: Any) -> Descent:
        seeds.append(rest["seed"])
        asked.append(rest["steps"])
        losses = tuple(factor * loss for loss in verdict.losses)
        return Descent(start, dataclasses.replace(verdict, losses=losses), rest["steps"], ())

    monkeypatch.setattr(descents_module, "descend", fake)
    record = searched(make(), tmp_path, objective="logits", steps=None)
    assert [trial.kept for trial in record.trials] == [True] + [factor < 1] * descents
    assert len(set(seeds)) == descents
    assert asked == sorted(set(asked))
    assert len(asked) == descents


def test_a_descent_is_judged_on_held_out_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stock = backprop_module.forward

    def forward(network: Any, weights_of: Any, tokens: Sequence[Tensor], *rest: Any) -> Any:
        seen.append([len(own) for own in tokens])
        return stock(network, weights_of, tokens, *rest)

    monkeypatch.setattr(judge_module, "forward", forward)
    searched(make(), tmp_path)
    assert seen
    assert all(counts == [3, 3] for counts in seen)


@pytest.mark.parametrize(
    ("left", "steps", "descends"), [(0.04, None, False), (0.3, None, True), (0.04, 2, True)]
)
def test_there_is_no_descent_where_layer_fits_left_little(
    left: float, steps: int | None, descends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a number of steps is configured."""
    asked = []

    def fake(_: Any, data: Any, start: MergeRecord, verdict: Verdict, **rest: Any) -> Descent:
        asked.append(rest["steps"])
        return Descent(start, verdict, 0, ())

    def judged(network: Any, record: MergeRecord, *_: Any, **__: Any) -> Verdict:
        size = left if record.reports else 1.0
        return Verdict((size, size), (1.0, 1.0))

    monkeypatch.setattr(descents_module, "descend", fake)
    for module in (survey_module, search_module):
        monkeypatch.setattr(module, "judged_at_output", judged)
    searched(make(), tmp_path, objective="layer+logits", steps=steps)
    assert bool(asked) == descends


@pytest.mark.parametrize(
    ("losses", "better"),
    [((0.2, 0.2), True), ((0.1, 0.38), True), ((0.1, 0.42), False), ((0.4, 0.31), False)],
)
def test_a_lower_mean_that_one_model_pays_for_is_not_better(
    losses: tuple[float, float], better: bool
) -> None:
    before = Verdict((0.4, 0.3), (1.0, 1.0))
    assert Verdict(losses, before.weights).better_than(before, 0.1) == better


def test_a_model_that_does_not_count_may_pay() -> None:
    before = Verdict((1.0, 1.0), (1.0, 0.0))
    assert Verdict((0.5, 9.0), before.weights).better_than(before, 0.1)


@pytest.mark.parametrize(("improved", "kept"), [(False, True), (True, False)])
def test_only_what_is_better_than_the_start_is_guarded(
    improved: bool, kept: bool, tmp_path: Path
) -> None:
    """A start may be as good as one of the models: no fit could keep that."""
    trials = [Trial("start", True, (0.0, 1.0), 0.5, 0.0)]
    if improved:
        trials.append(Trial("layer", True, (0.0, 0.9), 0.45, 0.0))
    journal = Journal(tmp_path, keeps=False)
    best = Best(MergeRecord(), Verdict((0.0, 0.9), (1.0, 1.0)), trials, journal)
    best.consider("another", MergeRecord(), Verdict((0.2, 0.2), (1.0, 1.0)), 0.0)
    assert best.trials[-1].kept == kept
