"""Searches for coefficients of experts."""

from pathlib import Path

import pytest

from tests.kit.autograd import check_gradients
from tests.kit.merging import dam, merge
from tests.kit.mixtures import CONFIGS, EXPERTS, save_mixtures
from tests.kit.networks import make


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_gradients_of_experts_coefficients_are_those_of_the_whole_network(
    name: str, tmp_path: Path
) -> None:
    made = make(config=CONFIGS[name]())
    check_gradients(made, tmp_path)
    experts = [own for own in made.coordinates.values() if own.kind == "experts"]
    columns = {"mixtral": {16, 24}, "qwen2-moe": {16, 12}, "gpt-oss": {16, 24}}[name]
    assert {own.columns for own in experts} == {EXPERTS * size for size in columns}
    assert [own.kind for own in made.coordinates.values()].count("router") == 2


def test_a_search_fits_experts_in_the_metric_and_end_to_end(tmp_path: Path) -> None:
    models, texts = save_mixtures("qwen2-moe", tmp_path)
    configuration = dam(
        models.models,
        texts,
        base=models.base,
        samples=16,
        sequence_length=24,
        objective="layer+logits",
        metric="sensitivity",
        steps=8,
    )
    merged = merge(configuration, tmp_path / "out")
    merged.load()
    trials = {trial["name"]: trial for trial in merged.report["search"]}
    assert trials["layer, sensitivity"]["kept"]
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "again").model_bytes == merged.model_bytes
    go_on = dam(models.models, texts, base=models.base, objective="logits", steps=1)
    go_on["parameters"] |= {"start": str(merged.path), "samples": 16, "sequence_length": 24}
    again = merge(go_on, tmp_path / "on")
    assert again.report["search"][0]["mean_held_out_kl"] == pytest.approx(
        min(trial["mean_held_out_kl"] for trial in trials.values()), rel=1e-4
    )
