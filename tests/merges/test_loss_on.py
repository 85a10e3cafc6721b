"""Merges in which the tokens of answers alone count in losses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.calibration.sets import CalibrationSet, tokens_sha256
from mergekit_dam.cli import main
from mergekit_dam.parameters import RunParameters
from tests.kit.merging import Merged, dam, merge, refused
from tests.kit.models import VOCAB_SIZE, Models
from tests.kit.projects import FITS, save_project
from tests.kit.resuming import Stopped, configured, watched
from tests.kit.texts import Calibration
from tests.kit.tokenizers import make_tokenizer

ASKED = 10
"""Words of a document that are the prompt."""


def with_answers(texts: Calibration, folder: Path, asked: int = ASKED) -> Calibration:
    """The same documents as prompts and completions."""
    folder.mkdir(exist_ok=True)
    for text in texts:
        rows = [json.loads(line)["text"].split() for line in text.read_text("utf-8").splitlines()]
        halves = [(" ".join(row[:asked]), " " + " ".join(row[asked:])) for row in rows]
        lines = [json.dumps({"prompt": first, "completion": rest}) for first, rest in halves]
        (folder / text.name).write_text("\n".join(lines), encoding="utf-8")
    first, second = (folder / text.name for text in texts)
    return first, second


def loaded(source: str, samples: int, length: int) -> CalibrationSet:
    return load_calibration(
        source,
        model="m",
        tokenizer=make_tokenizer(),
        samples=samples,
        sequence_length=length,
        vocab_size=VOCAB_SIZE,
        seed=0,
    )


@pytest.fixture(scope="module")
def answers(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return with_answers(calibration, tmp_path_factory.mktemp("answers"))


def on(texts: Calibration, which: str) -> list[str]:
    return [f"{text}:loss_on={which}" for text in texts]


@pytest.fixture(scope="module")
def counted(
    llama_models: Models, answers: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    fit = FITS["layer+logits"]
    configuration = dam(llama_models.models, on(answers, "assistant"), **fit)
    return merge(configuration, tmp_path_factory.mktemp("counted") / "out")


def test_report_and_lock_say_which_tokens_count(counted: Merged, answers: Calibration) -> None:
    report = counted.report
    lock = json.loads((counted.path / "dam_lock.json").read_text("utf-8"))
    for text, (name, told) in zip(answers, report["calibration"].items(), strict=True):
        own = loaded(f"{text}:loss_on=assistant", told["sequences"], told["sequence_length"])
        assert own.counted is not None
        assert told["tokens_counted"] == int(own.counted.sum()) < told["tokens_used"]
        held_out = RunParameters().held_out(told["sequences"])
        assert report["held_out_tokens"][name] == int(own.counted[-held_out:].sum())
        digest = tokens_sha256(own.tokens, own.counted)
        assert digest == lock["calibration"][name]["sha256"] == told["sha256"]
        assert f"of which {told['tokens_counted']:,} count" in (
            counted.path / "dam_report.html"
        ).read_text("utf-8")


def test_where_all_tokens_count_the_merge_is_that_without_the_option(
    llama_models: Models, answers: Calibration, counted: Merged, tmp_path: Path
) -> None:
    fit = FITS["layer+logits"]
    plain = merge(dam(llama_models.models, answers, **fit), tmp_path / "plain")
    every = merge(dam(llama_models.models, on(answers, "all"), **fit), tmp_path / "all")
    assert every.model_bytes == plain.model_bytes != counted.model_bytes
    assert not any("tokens_counted" in own for own in every.report["calibration"].values())


def test_a_merge_is_fitted_again_from_its_lock(
    llama_models: Models, answers: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = save_project(tmp_path / "project", llama_models, answers)
    project.configure(FITS["layer"])
    config = project.root / "dam.yaml"
    text = config.read_text("utf-8").replace(".jsonl", ".jsonl:loss_on=assistant")
    config.write_text(text, encoding="utf-8")
    made = project.merge(monkeypatch)
    assert all("tokens_counted" in own for own in made.report["calibration"].values())
    done = CliRunner().invoke(main, ["reproduce", str(made.path), "--refit", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["byte_identical"]


def test_other_tokens_that_count_start_a_stopped_merge_afresh(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = with_answers(calibration, tmp_path / "texts")
    configuration = configured(llama_models, on(texts, "assistant"), "layer, identity")  # type: ignore[arg-type]
    with pytest.raises(Stopped), watched("block 2/2"):
        merge(configuration, tmp_path / "out")
    with_answers(calibration, tmp_path / "texts", ASKED + 1)  # the same words
    merge(configuration, tmp_path / "out")
    assert "not continued: the calibration of" in caplog.text


def test_text_of_which_nothing_counts_is_refused(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    texts = with_answers(calibration, tmp_path / "texts", 10**6)
    said = "no token of the text is an assistant's"
    refused(dam(llama_models.models, on(texts, "assistant")), tmp_path / "out", said)
