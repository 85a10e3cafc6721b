"""Text is judged before it is used: a warning for each fault, and none for sound text."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergekit_dam.calibration import overlap
from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.overlap import Sentences, shared, union
from mergekit_dam.calibration.pieces import Piece
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.evaluation.texts import read_sequences
from tests.kit.tokenizers import BYTES, bpe


def word(number: int) -> str:
    return f"sentence number {number} stands in no other text than this one"


def sentences(texts: list[str]) -> Sentences:
    result = Sentences()
    pieces = [Piece(Document(text, "x"), i, 0, len(text)) for i, text in enumerate(texts)]
    assert list(result.of(pieces)) == pieces
    return result


def test_sound_text_gives_no_warning(
    texts: list[str], write: Any, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        provenance = load(write("a.jsonl", texts)).provenance
    assert provenance.warnings == ()
    assert not caplog.records


def test_copies_are_counted(
    texts: list[str], write: Any, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    provenance = load(write("a.jsonl", [*texts, *texts[:5]])).provenance
    (warning,) = provenance.warnings
    assert warning.startswith("5 of 25 documents read are copies of others")
    assert warning in caplog.text
    assert load(write("b.jsonl", [*texts, texts[0]])).provenance.warnings == ()


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_script_that_the_tokenizer_breaks_into_bytes_is_said(
    write: Any, load: Any, tokenizer: Any, kind: str
) -> None:
    if kind == "byte fallback":
        tokenizer = bpe((*BYTES, *"abcdefghijklmnopqrstuvwxyz "))
        tokenizer.bos_token = None
    source = write("a.jsonl", ["猫はかわいい" * 4, "the quick brown fox jumps" * 2])
    (warning,) = load(source, tokenizer=tokenizer, samples=8).provenance.warnings
    assert "of the tokens are parts of characters: the tokenizer breaks this script" in warning
    latin = write("b.jsonl", ["the quick brown fox jumps over a lazy dog\n" * 3])
    assert load(latin, tokenizer=tokenizer).provenance.warnings == ()


def test_text_of_unknown_tokens_is_said(write: Any, load: Any) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "fox": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    source = write("a.jsonl", ["the red fox sees the red dog and the cat now"])
    (warning,) = load(source, tokenizer=tokenizer, samples=1).provenance.warnings
    assert warning.startswith("62% of the tokens are the unknown token")


def test_the_share_of_sentences_that_two_texts_share() -> None:
    own = sentences([word(i) for i in range(100)])
    assert shared(own.kept(), sentences([word(i) for i in range(75, 175)])) == 0.25
    assert shared(own.kept(), sentences([word(i) for i in range(100, 200)])) == 0
    assert shared(own.kept(), sentences(["short"])) == 0


def test_digests_are_few_and_still_tell_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "KEPT", 200)
    halves = [sentences([word(i) for i in range(a, a + 2000)]).kept() for a in (0, 2000)]
    both = union(halves)
    assert both == sentences([word(i) for i in range(4000)]).kept()
    assert len(both) == 200 * 8
    half = sentences([word(i) for i in range(2000, 6000)])
    assert shared(both, half) == pytest.approx(0.5, abs=0.1)


def test_a_prompt_that_all_documents_have_is_no_overlap() -> None:
    prompt = "below is an instruction that describes a task, as ever"
    own = sentences([f"{prompt}\n{word(i)}" for i in range(30)])
    other = sentences([f"{prompt}\n{word(i)}" for i in range(30, 60)])
    assert shared(own.kept(), other) == 0


def test_judging_by_calibration_text_is_said(
    tmp_path: Path, write: Any, load: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = write("a.jsonl", [word(i) for i in range(40)])
    other = write("b.jsonl", [word(i) for i in range(40, 80)])
    report = tmp_path / "dam_report.json"
    kept = load(source, samples=30, sequence_length=32).provenance.sentences
    report.write_text(json.dumps({"calibration": {"org/math": {"sentences": kept}}}))
    settings = EvaluationSettings(sequence_length=32)
    for name, path in (("same", source), ("new", other)):
        read = Sentences()
        read_sequences(Path(path), tokenizer, settings, vocab_size=1000, sentences=read)
        overlap.warn_of_overlap(report, name, read)
        overlap.warn_of_overlap(tmp_path / "none.json", name, read)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("same: ")
    assert "of its sentences are in the calibration text of org/math, with which" in said
