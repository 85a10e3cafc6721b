"""The search: what its rungs are judged by, what is kept, and what it reads and leaves."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.errors import DamError
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.search import backprop as backprop_module
from mergekit_dam.search import descend as descend_module
from mergekit_dam.search import search as search_module
from mergekit_dam.search.descend import Descent, verdict_of
from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.judge import Verdict
from mergekit_dam.search.search import Best, search, survey
from mergekit_dam.sources import network as network_module
from mergekit_dam.sources.network import Network
from mergekit_dam.streams.boundaries import BoundaryStates
from tests.merging import Merged, dam, linear, merge, tensors_of, watched_reads
from tests.models import (
    VOCAB_SIZE,
    Models,
    make_tokenizer,
    save_calibration,
    save_models,
    tiny_llama_config,
)
from tests.networks import Given, Made, files_under, make
from tests.objective.made import logits_settings, run_settings

SAMPLES, LENGTH, HELD_OUT = 12, 16, 4
POLISH: dict[str, Any] = {
    "objective": "layer+logits",
    "samples": SAMPLES,
    "holdout": HELD_OUT / SAMPLES,
    "sequence_length": LENGTH,
    "steps": 3,
    "batch_size": 4,
    "learning_rate": 5e-3,
}
"""A search that takes a second or two."""
DESCENT = ("steps", "batch_size", "learning_rate")

Calibration = tuple[Path, Path]


def polished(
    models: Models,
    calibration: Sequence[Path],
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    base: bool = True,
    **more: Any,
) -> Merged:
    settings = {**POLISH, **(changes or {}), **more}
    if settings["objective"] == "layer":
        settings = {name: settings[name] for name in settings if name not in DESCENT}
    own = models.base if base else None
    return merge(dam(models.models, calibration, base=own, **settings), out)


@pytest.fixture(scope="module")
def merged(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    return polished(llama_models, calibration, tmp_path_factory.mktemp("search") / "out")


def held_out_tokens(model: Path, text: Path) -> Tensor:
    return load_calibration(
        str(text),
        model=str(model),
        tokenizer=make_tokenizer(),
        samples=SAMPLES,
        sequence_length=LENGTH,
        vocab_size=VOCAB_SIZE,
        seed=0,
    ).tokens[-HELD_OUT:]


@torch.no_grad()
def divergences(
    merged: PreTrainedModel, models: Models, calibration: Sequence[Path]
) -> list[float]:
    """KL of a model from each of its teachers, both as transformers loads them, nats a token."""
    found = []
    for folder, text in zip(models.models, calibration, strict=True):
        tokens = held_out_tokens(folder, text)
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        p, q = (log_softmax(m(tokens).logits.double(), -1) for m in (teacher, merged))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def rungs_of(merged: Merged) -> dict[str, dict[str, Any]]:
    """By what they begin with: "start", "layer" or "logits"; the last of each."""
    return {trial["name"].split(",")[0]: trial for trial in merged.report["search"]}


def best_of(merged: Merged) -> dict[str, Any]:
    """The last rung that was kept."""
    trial: dict[str, Any] = [trial for trial in merged.report["search"] if trial["kept"]][-1]
    return trial


def assert_sound(merged: Merged) -> None:
    """A rung is kept where it is better than all before it, and the result is the best of them."""
    lowest = math.inf
    for trial in merged.report["search"]:
        assert trial["kept"] == (trial["mean_held_out_kl"] < lowest), trial
        lowest = min(lowest, trial["mean_held_out_kl"])
    assert merged.report["search"][0]["name"] == "start"
    assert lowest == best_of(merged)["mean_held_out_kl"]


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
    assert rungs_of(merged)["start"]["held_out_kl"] == pytest.approx(expected, rel=1e-4)


def test_each_rung_is_judged_and_the_best_is_the_result(merged: Merged) -> None:
    names = list(rungs_of(merged))
    assert names[0] == "start"
    assert names[-1] == "logits"
    assert names[1:-1] == ["layer"]
    assert_sound(merged)
    assert best_of(merged)["name"].startswith("logits")
    assert best_of(merged)["mean_held_out_kl"] < rungs_of(merged)["start"]["mean_held_out_kl"]
    assert all(trial["seconds"] > 0 for trial in merged.report["search"])
    (best_step,) = rungs_of(merged)["logits"]["details"].values()
    assert 0 < best_step <= POLISH["steps"]


def test_the_result_is_the_sum_of_its_sources_times_the_coefficients(
    merged: Merged, llama_models: Models
) -> None:
    sources = [tensors_of(Path(source)) for source in merged.coefficients.sources]
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


def test_a_rung_that_is_worse_is_not_kept(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    """A hopeless descent leaves the layer fit, which is that of a merge without a search."""
    hopeless = polished(llama_models, calibration, tmp_path / "out", learning_rate=1e3)
    assert_sound(hopeless)
    assert not rungs_of(hopeless)["logits"]["kept"]
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
    assert list(rungs_of(merged)) == ["start", "logits"]
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
    assert ("logits" in rungs_of(merged)) == (objective == "layer+logits")
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
    starts = [rungs_of(run)["start"]["mean_held_out_kl"] for run in runs]
    assert starts[0] == starts[1] != starts[2]
    for run in runs:
        assert_sound(run)


def test_a_search_goes_on_from_the_coefficients_of_an_earlier_merge(
    merged: Merged, llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    changes = {"objective": "logits", "start": str(merged.path)}
    again = polished(llama_models, calibration, tmp_path / "out", changes)
    start = rungs_of(again)["start"]
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


def read_counts(
    folder: Path, layers: int, **changes: Any
) -> tuple[Models, Counter[tuple[str, str]], int, int]:
    """Reads of every tensor, the most bytes alive, and what was alive at the end."""
    models = save_models(folder, tiny_llama_config(num_hidden_layers=layers), count=2)
    text = save_calibration(folder / "text.jsonl")
    with watched_reads() as reads:
        polished(models, [text, text], folder / "out", changes)
    return models, Counter(reads.order), reads.peak, reads.live


def test_what_stays_in_memory_is_read_once_and_once_to_be_written(tmp_path: Path) -> None:
    _, counts, _, live = read_counts(tmp_path, 3, resident="always")
    assert set(counts.values()) == {2}
    assert live == 0


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
def test_without_room_one_stage_of_all_models_is_in_memory(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "_has_room", lambda _: False)
    models, counts, peak, live = read_counts(tmp_path, 5, resident="auto", metric=metric)
    sizes = [
        sum(t.nbytes for name, t in tensors_of(models.base).items() if name.startswith(parts))
        for parts in ("model.embed_tokens", "model.layers.0.", ("model.norm", "lm_head"))
    ]
    assert peak == 3 * max(sizes)
    assert live == 0
    blocks = {count for (_, name), count in counts.items() if ".layers." in name}
    assert len(blocks) == 1


def reads_of(network: Network) -> list[set[int]]:
    """How often the tensors of each stage were read since the last time this was asked."""
    found = []
    for gathers in network.gathers:
        given = [task.given for task in gathers if isinstance(task, Given)]
        found.append({own.reads for own in given})
        for own in given:
            own.reads = 0
    return found


def test_a_sweep_reads_a_stage_once_and_a_step_twice(tmp_path: Path) -> None:
    made = make(base=True)
    network = made.network("never")
    survey_ = survey(network, made.streams(), made.average(), BoundaryStates(tmp_path), show=_quiet)
    assert reads_of(network) == [{1}] * 4
    assert len(survey_[1]) == 2
    verdict_of(network, made.average(), made.data())
    assert reads_of(network) == [{1}] * 4
    objective = Objective(network, made.coordinates, logits_settings(), BoundaryStates(tmp_path))
    for _ in range(3):
        objective(made.average(), made.batches())
        assert reads_of(network) == [{2}, {2}, {2}, {1}]
    resident = made.network("always")
    objective = Objective(resident, made.coordinates, logits_settings(), BoundaryStates(tmp_path))
    for _ in range(3):
        objective(made.average(), made.batches())
    assert reads_of(resident) == [{1}] * 4


def _quiet(_: str) -> None:
    pass


def searched(made: Made, scratch: Path, *, show: Any = _quiet, **changes: Any) -> MergeRecord:
    logits = logits_settings(steps=2, batch_size=4, learning_rate=5e-3)
    settings = dataclasses.replace(run_settings(), objective="layer+logits", logits=logits)
    settings = dataclasses.replace(settings, **changes)
    return search(
        made.network(), made.streams(9, 3), settings, made.average(), scratch=scratch, show=show
    )


def test_a_layer_sweep_that_is_worse_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = fit_stage

    def ruin(opened: Any, streams: Any, record: MergeRecord, **rest: Any) -> Any:
        result = stock(opened, streams, record, **rest)
        for stream in streams:
            stream.merged = -stream.merged if opened.stage.kind == "block" else stream.merged
        return result

    monkeypatch.setattr(search_module, "fit_stage", ruin)
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
def test_the_best_is_kept(loss: float, kept: bool) -> None:
    start, other = MergeRecord(), MergeRecord()
    best = Best(start, Verdict((1.0, 1.0), (1.0, 2.0)), [])
    verdict = Verdict((loss, loss), (1.0, 2.0))
    best.consider("another", other, verdict, 0.0, steps=3)
    assert best.record is (other if kept else start)
    assert (best.verdict is verdict) == kept
    (trial,) = best.trials
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
    assert found.mean == pytest.approx(min(r.mean_held_out_kl for r in record.trials), rel=1e-4)
    assert found.mean < start.mean_held_out_kl
    assert {trial.name for trial in rest if trial.kept}
    assert record.coefficients.keys() == made.weights[0].keys()
    assert record.axes["transformer.h.0.mlp.c_fc.weight"] == 0


def test_the_surveys_teachers_are_the_models(tmp_path: Path) -> None:
    made = make("llama-tied")
    _, data, _ = survey(
        made.network(), made.streams(), made.average(), BoundaryStates(tmp_path), show=_quiet
    )
    for own, expected in zip(data, made.data(), strict=True):
        torch.testing.assert_close(own.teacher, expected.teacher, rtol=1e-4, atol=1e-5)
        assert own.tokens.equal(expected.tokens)
        assert (own.source, own.weight, own.held_out) == (
            expected.source,
            expected.weight,
            expected.held_out,
        )


@pytest.mark.parametrize(("factor", "descents"), [(0.5, 2), (0.95, 1), (1.5, 1)])
def test_a_long_descent_follows_a_short_one_that_paid(
    factor: float, descents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, asked = [], []

    def fake(_: Any, data: Any, start: MergeRecord, verdict: Verdict, **rest: Any) -> Descent:
        seeds.append(rest["seed"])
        asked.append(rest["steps"])
        losses = tuple(factor * loss for loss in verdict.losses)
        return Descent(start, dataclasses.replace(verdict, losses=losses), rest["steps"], ())

    monkeypatch.setattr(search_module, "descend", fake)
    logits = logits_settings(steps=None)
    record = searched(make(), tmp_path, objective="logits", logits=logits)
    assert [trial.kept for trial in record.trials] == [True] + [factor < 1] * descents
    assert len(set(seeds)) == descents
    assert asked == sorted(set(asked))
    assert len(asked) == descents


class Interrupted(BaseException):
    """Like Ctrl-C, which would end the tests."""


@pytest.mark.parametrize("at", ["start", "block", "step", None])
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, DamError])
def test_scratch_files_go_away_whatever_happens(
    at: str | None, error: type[BaseException], tmp_path: Path
) -> None:
    seen: list[set[str]] = []

    def show(line: str) -> None:
        seen.append(files_under(tmp_path))
        if at is not None and line.startswith(at) and len(seen) > 1:
            raise error("no more")

    made = make()
    if at is None:
        searched(made, tmp_path / "scratch", show=show, metric="sensitivity")
        assert any(name.endswith(".safetensors") for files in seen for name in files)
    else:
        with pytest.raises(error):
            searched(made, tmp_path / "scratch", show=show, metric="sensitivity")
    assert all(name.startswith("scratch") for files in seen for name in files)
    assert files_under(tmp_path) == {"scratch"}


def test_nothing_is_left_beside_a_merge(merged: Merged) -> None:
    assert not [path for path in merged.path.iterdir() if path.name.startswith(".dam")]


def test_a_merge_that_ends_early_leaves_no_scratch_files(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(search_module, "descend", fail)
    with pytest.raises(KeyboardInterrupt):
        polished(llama_models, calibration, tmp_path / "out")
    assert not [name for name in files_under(tmp_path) if ".dam" in name or "tensors" in name]


def test_weights_that_were_kept_are_let_go_of(tmp_path: Path) -> None:
    made = make()
    network = made.network("always")
    settings = dataclasses.replace(run_settings(), objective="layer", metric="sensitivity")
    search(network, made.streams(), settings, made.average(), scratch=tmp_path, show=_quiet)
    assert not any(network.keeps(number) for number in range(len(network.stages)))


def test_a_descent_is_looked_at_on_held_out_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stock = backprop_module.forward

    def forward(network: Any, weights_of: Any, tokens: Sequence[Tensor], *rest: Any) -> Any:
        seen.append([len(own) for own in tokens])
        return stock(network, weights_of, tokens, *rest)

    monkeypatch.setattr(descend_module, "forward", forward)
    searched(make(), tmp_path)
    assert seen
    assert all(counts == [3, 3] for counts in seen)
