"""Whole merges by a search: the trials are judged as reported, and the best is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_dam.search.best import SACRIFICE
from tests.kit.merging import Merged, dam, linear, merge, tensors_of
from tests.kit.models import Models, loaded, logits_of, save_models, tiny_llama_config
from tests.kit.searches import HELD_OUT, POLISH, SAMPLES, polished
from tests.kit.tensors import kl
from tests.kit.texts import Calibration, calibration_tokens
from tests.kit.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def merged(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    return polished(llama_models, calibration, tmp_path_factory.mktemp("search") / "out")


@torch.no_grad()
def divergences(
    merged: PreTrainedModel, models: Models, calibration: Sequence[Path]
) -> list[float]:
    """KL of a model from each of its teachers, in nats per token, as transformers loads them."""
    found = []
    for folder, text in zip(models.models, calibration, strict=True):
        tokens = calibration_tokens(text, make_tokenizer(), samples=SAMPLES)[-HELD_OUT:]
        teacher = loaded(folder)
        found.append(kl(logits_of(teacher, tokens), logits_of(merged, tokens)))
    return found


def trials_of(merged: Merged) -> dict[str, dict[str, Any]]:
    """By what they begin with: "start", "layer" or "logits"; the last of each."""
    return {trial["name"].split(",")[0]: trial for trial in merged.report["search"]}


def best_of(merged: Merged) -> dict[str, Any]:
    """The last trial that was kept."""
    trial: dict[str, Any] = [trial for trial in merged.report["search"] if trial["kept"]][-1]
    return trial


def assert_sound(merged: Merged) -> None:
    """A trial is kept where it is better than all that were kept before it, and no model pays."""
    start, *rest = merged.report["search"]
    assert start["name"] == "start"
    best = start
    for trial in rest:
        lower = trial["mean_held_out_kl"] < best["mean_held_out_kl"]
        pairs = zip(trial["held_out_kl"], best["held_out_kl"], strict=True)
        most = max(own - was for own, was in pairs)
        paid = best is not start and most > SACRIFICE * start["mean_held_out_kl"]
        assert trial["kept"] == (lower and not paid), trial
        best = trial if trial["kept"] else best
    assert best is best_of(merged)


def test_the_reported_kl_is_that_of_the_model_on_disk(
    merged: Merged, llama_models: Models, calibration: Calibration
) -> None:
    expected = divergences(merged.load(), llama_models, calibration)
    assert best_of(merged)["held_out_kl"] == pytest.approx(expected, rel=1e-4)
    assert best_of(merged)["mean_held_out_kl"] == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_the_kl_of_the_start_is_that_of_the_plain_average(
    merged: Merged, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    average = merge(linear(llama_models.models, dtype="float32"), tmp_path / "average")
    model = AutoModelForCausalLM.from_pretrained(average.path, dtype=torch.float32)
    expected = divergences(model, llama_models, calibration)
    assert trials_of(merged)["start"]["held_out_kl"] == pytest.approx(expected, rel=1e-4)


def test_each_trial_is_judged_and_the_best_is_the_result(merged: Merged) -> None:
    names = list(trials_of(merged))
    assert names[0] == "start"
    assert names[-1] == "logits"
    assert names[1:-1] == ["layer"]
    assert_sound(merged)
    assert best_of(merged)["name"].startswith("logits")
    assert best_of(merged)["mean_held_out_kl"] < trials_of(merged)["start"]["mean_held_out_kl"]
    assert all(seconds > 0 for seconds in merged.report["this_run"]["trial_seconds"])
    details = trials_of(merged)["logits"]["details"]
    assert 0 < details["best_step"] <= details["steps"] == POLISH["steps"]


def test_the_result_is_the_sum_of_its_sources_times_the_coefficients(
    merged: Merged, llama_models: Models
) -> None:
    sources = [tensors_of(folder) for folder in (*llama_models.models, llama_models.base)]
    assert merged.coefficients.coefficients.keys() == merged.tensors.keys()
    for name, tensor in merged.tensors.items():
        rows = merged.coefficients.coefficients[name]
        pairs = zip(rows, sources, strict=True)
        expected = sum(row.double() * source[name].double() for row, source in pairs)
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(rows.sum(0), torch.ones(rows.shape[1]), rtol=0, atol=1e-5)


def test_the_report_has_an_entry_for_every_tensor(merged: Merged) -> None:
    assert merged.entries.keys() == merged.tensors.keys()
    assert {entry["kind"] for entry in merged.entries.values()} >= {"linear", "norm", "head"}


def test_the_same_search_gives_the_same_bytes(
    merged: Merged, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    again = polished(llama_models, calibration, tmp_path / "out")
    assert again.model_bytes == merged.model_bytes
    assert again.coefficient_bytes == merged.coefficient_bytes


@pytest.mark.parametrize("resident", ["always", "never"])
def test_resident_or_not_the_bytes_are_the_same(
    resident: str,
    merged: Merged,
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    again = polished(llama_models, calibration, tmp_path / "out", resident=resident)
    assert again.model_bytes == merged.model_bytes


def test_a_replay_gives_the_same_bytes(
    merged: Merged, llama_models: Models, tmp_path: Path
) -> None:
    replay = dam(llama_models.models, base=llama_models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "out").model_bytes == merged.model_bytes


def test_a_trial_that_is_worse_is_not_kept(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    """A hopeless descent leaves the layer fit, which is that of a merge without a search."""
    hopeless = polished(llama_models, calibration, tmp_path / "out", learning_rate=1e3)
    assert_sound(hopeless)
    assert not trials_of(hopeless)["logits"]["kept"]
    layer = polished(llama_models, calibration, tmp_path / "layer", objective="layer")
    assert "layer" in best_of(hopeless)["name"]
    assert hopeless.model_bytes == layer.model_bytes
    same = [name for name, entry in hopeless.entries.items() if entry["outcome"] == "fitted"]
    assert same == [name for name, entry in layer.entries.items() if entry["outcome"] == "fitted"]


def test_the_paper_alone(llama_models: Models, calibration: Calibration, tmp_path: Path) -> None:
    """`objective: logits` in its free form, from the average."""
    merged = polished(
        llama_models,
        calibration,
        tmp_path / "out",
        base=False,
        objective="logits",
        sum_to_one=False,
        similarity=0.01,
        temperature=2.0,
        mse=0.01,
    )
    assert_sound(merged)
    assert list(trials_of(merged)) == ["start", "logits"]
    expected = divergences(merged.load(), llama_models, calibration)
    assert best_of(merged)["held_out_kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", ["layer", "layer+logits"])
def test_the_sensitivity_metric(
    objective: str, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    changes = {"metric": "sensitivity", "objective": objective}
    merged = polished(llama_models, calibration, tmp_path / "out", changes)
    assert_sound(merged)
    assert any("sensitivity" in trial["name"] for trial in merged.report["search"])
    assert ("logits" in trials_of(merged)) == (objective == "layer+logits")
    expected = divergences(merged.load(), llama_models, calibration)
    assert best_of(merged)["held_out_kl"] == pytest.approx(expected, rel=1e-4)
    again = polished(
        llama_models, calibration, tmp_path / "again", changes=changes, resident="never"
    )
    assert again.model_bytes == merged.model_bytes


def test_a_random_start_is_that_of_the_seed(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    changes = {"objective": "logits", "start": "random"}
    runs = [
        polished(llama_models, calibration, tmp_path / str(i), changes, seed=seed)
        for i, seed in enumerate([1, 1, 2])
    ]
    assert runs[0].model_bytes == runs[1].model_bytes
    starts = [trials_of(run)["start"]["mean_held_out_kl"] for run in runs]
    assert starts[0] == starts[1] != starts[2]
    for run in runs:
        assert_sound(run)


def test_a_search_goes_on_from_the_coefficients_of_an_earlier_merge(
    merged: Merged, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    changes = {"objective": "logits", "start": str(merged.path)}
    again = polished(llama_models, calibration, tmp_path / "out", changes)
    start = trials_of(again)["start"]
    assert start["held_out_kl"] == pytest.approx(best_of(merged)["held_out_kl"], rel=1e-6)
    assert_sound(again)
    nowhere = polished(llama_models, calibration, tmp_path / "no", changes, learning_rate=1e3)
    assert nowhere.model_bytes == merged.model_bytes


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
def test_tied_models(metric: str, calibration: Calibration, tmp_path: Path) -> None:
    models = save_models(tmp_path, tiny_llama_config(tie_word_embeddings=True), count=2)
    merged = polished(models, calibration, tmp_path / "out", metric=metric)
    assert_sound(merged)
    expected = divergences(merged.load(), models, calibration)
    assert best_of(merged)["held_out_kl"] == pytest.approx(expected, rel=1e-4)
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "replay").model_bytes == merged.model_bytes


def test_bfloat16_is_judged_as_it_is_written(calibration: Calibration, tmp_path: Path) -> None:
    models = save_models(tmp_path, tiny_llama_config(), dtype=torch.bfloat16)
    merged = polished(models, calibration, tmp_path / "out", resident="never")
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
    assert_sound(merged)
    expected = divergences(merged.load(), models, calibration)
    assert best_of(merged)["held_out_kl"] == pytest.approx(expected, rel=1e-3)
    replay = dam(models.models, base=models.base, coefficients=str(merged.path))
    assert merge(replay, tmp_path / "replay").model_bytes == merged.model_bytes


def test_only_adapters_that_differ_are_searched(calibration: Calibration, tmp_path: Path) -> None:
    """As after a fine-tune with LoRA: embeddings, norms and the head are the base's."""
    models = save_models(tmp_path, tiny_llama_config())
    base = tensors_of(models.base)
    for folder in models.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_proj" not in name:
                    parameter.copy_(base[name])
        model.save_pretrained(folder)
    merged = polished(models, calibration, tmp_path / "out")
    assert_sound(merged)
    for name, tensor in merged.tensors.items():
        assert torch.allclose(tensor, base[name], atol=1e-6) == ("_proj" not in name), name


def test_nothing_is_left_beside_a_merge(merged: Merged) -> None:
    assert not [path for path in merged.path.iterdir() if path.name.startswith(".dam")]
