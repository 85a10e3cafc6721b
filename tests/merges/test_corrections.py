"""Merges whose linears get a correction after their columns."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import save_file

from mergekit_dam.errors import ConfigError
from mergekit_dam.search import descents
from tests.kit.merging import Merged, dam, merge, tensors_of
from tests.kit.mixtures import save_mixtures
from tests.kit.models import ARCHITECTURES, Models, save_models
from tests.kit.texts import Calibration, save_calibration

FILE = "dam_corrections.safetensors"
KINDS = ("low_rank", "full")


def corrected(
    models: Models, calibration: Sequence[Path], out: Path, kind: str, **more: Any
) -> Merged:
    small = {"correction": kind, "samples": 48, **more}
    if kind == "low_rank":
        small.setdefault("correction_rank", 4)
    return merge(dam(models.models, calibration, base=models.base, **small), out)


def replayed(merged: Merged, models: Models, out: Path) -> Merged:
    """The same merge from its coefficients."""
    return merge(dam(models.models, base=models.base, coefficients=str(merged.path)), out)


def kl_of(merged: Merged) -> float:
    """Held-out KL of the whole model after the last trial."""
    kl: float = merged.report["search"][-1]["mean_held_out_kl"]
    return kl


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_replay_gives_the_same_bytes(name: str, kind: str, metric: str, tmp_path: Path) -> None:
    models = save_models(tmp_path, ARCHITECTURES[name](), count=2)
    texts = (save_calibration(tmp_path / "a.jsonl"), save_calibration(tmp_path / "b.jsonl", seed=1))
    fitted = corrected(models, texts, tmp_path / "out", kind, metric=metric)
    assert (fitted.path / FILE).is_file()
    assert not [path for path in fitted.path.iterdir() if path.name.startswith(".dam")]
    again = replayed(fitted, models, tmp_path / "again")
    assert again.model_bytes == fitted.model_bytes
    assert (again.path / FILE).read_bytes() == (fitted.path / FILE).read_bytes()
    assert again.load()


@pytest.mark.parametrize("granularity", ["column", "tensor"])
def test_a_linear_that_no_loss_depends_on_is_fitted_plainly(
    granularity: str, calibration: Calibration, tmp_path: Path
) -> None:
    """The gate is zero in all models, and so is the gradient of what it multiplies."""
    models = save_models(tmp_path, ARCHITECTURES["llama"](), count=2)
    for folder in (models.base, *models.models):
        tensors = tensors_of(folder)
        tensors["model.layers.1.mlp.gate_proj.weight"].zero_()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = corrected(
        models, calibration, tmp_path / "out", "full", metric="sensitivity", granularity=granularity
    )
    entry = made.entries["model.layers.1.mlp.up_proj.weight"]
    assert entry["held_out_start"] > 0
    assert entry["correction"]["outcome"] == "full"


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_what_became_of_every_correction(
    kind: str, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    merged = corrected(llama_models, calibration, tmp_path / "out", kind)
    stored = {name.rpartition(".")[0] for name in torch_keys(merged.path / FILE)}
    linears = {n: e for n, e in merged.entries.items() if e["kind"] in ("linear", "head")}
    assert stored <= linears.keys()
    for name, entry in linears.items():
        said = entry["correction"]
        if name in stored:
            assert said["held_out"] < said["held_out_start"]
            assert said["outcome"] == kind.replace("_", " ")
            assert (said.get("rank") == 4) == (kind == "low_rank")
        else:
            assert said["outcome"].startswith("dropped")
    assert all("correction" not in e for n, e in merged.entries.items() if n not in linears)


def torch_keys(file: Path) -> list[str]:
    size = int.from_bytes(file.read_bytes()[:8], "little")
    return [k for k in json.loads(file.read_bytes()[8 : 8 + size]) if k != "__metadata__"]


def test_without_one_nothing_of_it_is_written(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    plain = corrected(llama_models, calibration, tmp_path / "out", "none")
    assert not (plain.path / FILE).exists()
    assert "corrections" not in plain.report
    assert all("correction" not in entry for entry in plain.entries.values())


def test_corrections_bring_the_merged_model_nearer_to_its_teachers(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    """Of models that are far apart, on more text than a few sequences."""
    common = {"samples": 48, "metric": "sensitivity"}
    found = {
        kind: kl_of(corrected(llama_models, calibration, tmp_path / kind, kind, **common))
        for kind in ("none", "low_rank", "full")
    }
    assert found["full"] < 0.97 * found["none"]
    assert found["low_rank"] < found["none"]


def test_a_slice_of_the_linears_may_have_them(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    own = [{"filter": "mlp", "value": "full"}, {"value": "none"}]
    config = dam(llama_models.models, calibration, base=llama_models.base, samples=48)
    config["parameters"]["correction"] = own
    merged = merge(config, tmp_path / "out")
    assert {".mlp." in key for key in torch_keys(merged.path / FILE)} == {True}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_have_corrections_of_their_own(kind: str, tmp_path: Path) -> None:
    models, texts = save_mixtures("mixtral", tmp_path)
    merged = corrected(models, texts, tmp_path / "out", kind, samples=16, sequence_length=24)
    keys = {key for key in torch_keys(merged.path / FILE) if "experts" in key}
    assert keys
    again = replayed(merged, models, tmp_path / "again")
    assert again.model_bytes == merged.model_bytes


def test_a_descent_goes_on_from_them_and_keeps_them(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    merged = corrected(
        llama_models,
        calibration,
        tmp_path / "out",
        "full",
        objective="layer+logits",
        steps=3,
        learning_rate=1e-3,
    )
    again = replayed(merged, llama_models, tmp_path / "again")
    assert again.model_bytes == merged.model_bytes
    assert (merged.path / FILE).is_file()


def test_a_fit_may_start_from_a_merge_with_them(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    first = corrected(llama_models, calibration, tmp_path / "first", "full")
    config = dam(
        llama_models.models,
        calibration,
        base=llama_models.base,
        objective="logits",
        steps=1,
        learning_rate=1e-30,
        start=str(first.path),
    )
    second = merge(config, tmp_path / "second")
    for name, tensor in tensors_of(first.path).items():
        torch.testing.assert_close(tensors_of(second.path)[name], tensor)


def test_tensors_in_memory_are_merged_with_them(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    merged = corrected(llama_models, calibration, tmp_path / "out", "full")
    order = [*llama_models.models, llama_models.base]
    states: dict[Hashable, Any] = {str(path): tensors_of(path) for path in order}
    found = merge_state_dicts(states, "dam", parameters={"coefficients": str(merged.path)})
    for name, tensor in merged.tensors.items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("fault", ["there is none", "a damaged file", "the one of another merge"])
def test_coefficients_without_their_corrections_are_refused(
    fault: str, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    merged = corrected(llama_models, calibration, tmp_path / "out", "full")
    file = merged.path / FILE
    if fault == "there is none":
        file.unlink()
    elif fault == "a damaged file":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        other = corrected(llama_models, calibration, tmp_path / "other", "low_rank")
        file.write_bytes((other.path / FILE).read_bytes())
    with pytest.raises(ConfigError, match=f"required its {FILE} in the same folder.*{fault}"):
        replayed(merged, llama_models, tmp_path / "again")


def test_a_merge_without_them_removes_those_of_the_merge_before(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    first = corrected(llama_models, calibration, tmp_path / "out", "full")
    assert (first.path / FILE).exists()
    second = corrected(llama_models, calibration, tmp_path / "out", "none")
    assert not (second.path / FILE).exists()


def test_an_interrupted_search_leaves_none_behind(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(descents, "descend", fail)
    with pytest.raises(KeyboardInterrupt):
        corrected(
            llama_models,
            calibration,
            tmp_path / "out",
            "full",
            objective="layer+logits",
            steps=1,
            resume=False,
        )
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_a_head_is_corrected_on_more_tokens_of_all_models_than_a_model_has_positions(
    calibration: Calibration, tmp_path: Path
) -> None:
    config = ARCHITECTURES["gpt2"]()
    config.tie_word_embeddings = False
    models = save_models(tmp_path / "models", config, count=3)
    small = {"objective": "layer", "metric": "identity", "samples": 8, "sequence_length": 48}
    texts = [*calibration, calibration[0]]
    found = corrected(models, texts, tmp_path / "out", "low_rank", **small)
    assert found.entries["lm_head.weight"]["correction"]["outcome"] == "low rank"
