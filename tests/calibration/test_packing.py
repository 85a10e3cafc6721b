"""Packing loses nothing, repeats nothing, and is the same every time."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import pytest
import torch

from mergekit_dam.calibration import load as load_module
from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.packing import document_start, pack
from mergekit_dam.calibration.pieces import Intake, Piece, shuffled_pieces, text_stops
from mergekit_dam.calibration.rows import permutation
from mergekit_dam.errors import CalibrationError


def whole(contents: Sequence[str | tuple[int, ...]]) -> list[Piece]:
    return [
        Piece(Document(content, f"document {i}"), i, 0, len(content))
        for i, content in enumerate(contents)
    ]


def test_short_documents_are_packed_end_to_end_without_losing_a_token(
    texts: list[str], tokenizer: Any
) -> None:
    oracle = list(
        chain.from_iterable([tokenizer.bos_token_id, *tokenizer(t)["input_ids"]] for t in texts)
    )
    full = len(oracle) // 8
    packed = pack(
        whole(texts), tokenizer=tokenizer, sequences=full, sequence_length=8, vocab_size=1000
    )
    assert packed.tokens.dtype == torch.int64
    assert packed.tokens.shape == (full, 8)
    assert packed.tokens.flatten().tolist() == oracle[: full * 8]


def test_a_set_that_uses_up_its_source_holds_every_document(
    texts: list[str], write: Any, load: Any, tokenizer: Any
) -> None:
    source = write("a.jsonl", [{"text": text} for text in texts])
    total = sum(1 + len(tokenizer(text)["input_ids"]) for text in texts)
    calibration = load(source, samples=1, sequence_length=total)
    decoded = tokenizer.decode(calibration.tokens.flatten().tolist()).split("<s>")
    assert sorted(decoded) == sorted(["", *texts])
    provenance = calibration.provenance
    assert (provenance.documents_used, provenance.tokens_available) == (len(texts), total)


def test_tokenising_stops_when_there_are_enough(tokenizer: Any) -> None:
    read: list[int] = []

    def endless() -> Any:
        for i in range(10**9):
            read.append(i)
            yield Piece(Document("the quick brown fox", "x"), i, 0, 19)

    pack(endless(), tokenizer=tokenizer, sequences=3, sequence_length=8, vocab_size=1000)
    assert len(read) < 24


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"adds_bos": True}, ["<s>"]),
        ({"adds_bos": False}, ["<s>"]),
        ({"bos": False}, ["</s>"]),
        ({"bos": False, "eos": False}, []),
    ],
)
def test_every_document_begins_as_the_tokenizer_begins_one(
    tokenizer_factory: Any, settings: dict[str, bool], start: list[str]
) -> None:
    tokenizer = tokenizer_factory(**settings)
    ids = tokenizer.convert_tokens_to_ids(start)
    assert document_start(tokenizer) == ids
    text = "the fox"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    packed = pack(
        whole([text, text]),
        tokenizer=tokenizer,
        sequences=2 * (len(ids) + len(bare)),
        sequence_length=1,
        vocab_size=1000,
    )
    assert packed.tokens.flatten().tolist() == [*ids, *bare, *ids, *bare]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_saved_with_its_bos_gets_no_second_one(
    tokenizer_factory: Any, adds_bos: bool
) -> None:
    tokenizer = tokenizer_factory(adds_bos=adds_bos)
    packed = pack(
        whole(["<s>the fox"]), tokenizer=tokenizer, sequences=3, sequence_length=1, vocab_size=1000
    )
    assert packed.tokens.flatten().tolist().count(tokenizer.bos_token_id) == 1


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(
    texts: list[str], write: Any, load: Any
) -> None:
    source = write("a.jsonl", [{"text": text} for text in texts])
    first, again, other = (load(source, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    assert not torch.equal(first.tokens, other.tokens)


def test_the_order_on_every_machine_is_this_one(write: Any, load: Any) -> None:
    source = write("a.jsonl", [{"input_ids": [i] * 4} for i in range(8)])
    assert load(source, samples=4).tokens[:, ::4].flatten().tolist() == permutation(8, seed=0)


def test_the_order_is_a_known_permutation() -> None:
    assert permutation(8, seed=0) == [3, 7, 5, 2, 4, 1, 6, 0]
    assert sorted(permutation(100, seed=5)) == list(range(100))


def test_cuts_lose_no_character_and_prefer_lines_then_words() -> None:
    text = "the quick brown fox\njumps over\n\na lazy dog " + "x" * 50
    stops = text_stops(text, 16)
    starts = [0, *stops[:-1]]
    parts = [text[a:b] for a, b in zip(starts, stops, strict=True)]
    assert "".join(parts) == text
    assert all(0 < len(part) <= 16 for part in parts)
    assert parts[0] == "the quick brown"  # " fox" goes on as a word with its space
    assert "jumps over\n" in "".join(parts[1:3])
    assert text_stops("short", 16) == [5]


def test_one_huge_document_is_sampled_all_over(write: Any, load: Any, tokenizer: Any) -> None:
    # 100 stretches of one number each: the tens that are seen tell where text was taken from.
    text = "".join(f"{number:03d} " * 50 for number in range(100))
    calibration = load(write("a.txt", text), samples=80, sequence_length=16)
    decoded = tokenizer.decode(calibration.tokens.flatten().tolist())
    seen = {word[1:2] for word in decoded.split()}
    assert len(seen & set("0123456789")) >= 5
    assert calibration.provenance.tokens_available < 2000  # not the whole text was tokenised
    assert any(
        "1 documents longer than 128 characters" in cut for cut in calibration.provenance.cut
    )


def test_reading_stops_at_the_window_and_says_so(
    texts: list[str],
    write: Any,
    load: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(load_module, "LOCAL_WINDOW", 100)
    source = write("a.jsonl", [{"text": text} for text in texts])
    with caplog.at_level(logging.INFO):
        provenance = load(source, samples=1).provenance
    assert provenance.documents_read < len(texts)
    assert "text is shuffled 100 characters at a time" in provenance.cut[0]
    assert provenance.cut[0] in caplog.text
    assert provenance.summary() in caplog.text


def test_a_source_larger_than_a_window_is_read_on_while_tokens_are_missing(
    texts: list[str], write: Any, load: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("a.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr(load_module, "LOCAL_WINDOW", 50)
    total = sum(1 + len(tokenizer(text)["input_ids"]) for text in texts)
    provenance = load(source, samples=1, sequence_length=total).provenance
    assert provenance.documents_used == len(texts)
    assert provenance.tokens_used == total


def test_a_later_piece_of_a_chat_begins_like_plain_text(chat_tokenizer: Any) -> None:
    chat = Document("<s>[user] the fox jumps", "x", templated=True)
    cut = [Piece(chat, 0, 0, 13), Piece(chat, 0, 13, 23)]
    text = "<s>[user] the<s> fox jumps"
    oracle = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    packed = pack(
        cut, tokenizer=chat_tokenizer, sequences=1, sequence_length=len(oracle), vocab_size=1000
    )
    assert packed.tokens.tolist() == [oracle]
    assert packed.tokenised == len(oracle)


def test_a_window_never_holds_more_than_it_may() -> None:
    intake = Intake()
    documents = (Document("x" * 10, f"{i}", file="f") for i in range(100))
    pieces = shuffled_pieces(documents, window=30, piece_tokens=1, seed=0, intake=intake)
    next(pieces)
    assert (intake.documents, intake.characters, intake.exhausted) == (3, 30, False)
    assert len(list(pieces)) == 100 * 3 - 1
    assert (intake.documents, intake.cut, intake.exhausted) == (100, 100, True)


def test_too_few_tokens_say_what_there_is_and_what_to_do(write: Any, load: Any) -> None:
    source = write("a.jsonl", [{"input_ids": list(range(20))}])
    with pytest.raises(CalibrationError) as caught:
        load(source, samples=128)
    message = str(caught.value)
    assert message.startswith("calibration of org/math: 128 sequences of 8 tokens (1,024 tokens)")
    assert f"{source!r} holds 20 tokens in 1 documents, which are 2 full sequences" in message
    assert f"`samples: 2`, or for this model alone `{source}:samples=2`" in message
    with pytest.raises(CalibrationError, match="or set `sequence_length` to 10 or less"):
        load(source, sequence_length=32)


def test_the_source_may_override_the_number_of_sequences(write: Any, load: Any) -> None:
    source = write("a.jsonl", [{"input_ids": list(range(64))}])
    assert load(f"{source}:samples=5").tokens.shape == (5, 8)


def test_the_provenance_is_json_and_counts_add_up(texts: list[str], write: Any, load: Any) -> None:
    source = write("a.jsonl", [{"text": text} for text in [*texts, ""]])
    calibration = load(source, samples=3)
    found = json.loads(json.dumps(asdict(calibration.provenance)))
    assert found["files"] == [source]
    assert (found["sequences"], found["sequence_length"], found["tokens_used"]) == (3, 8, 24)
    assert found["documents_used"] < found["documents_read"] == len(texts)
    assert found["tokens_available"] >= 24
    assert "1 empty documents were skipped" in found["cut"]
    assert len(found["sha256"]) == 64
    assert "3 sequences of 8 tokens" in calibration.provenance.summary()
    assert "\n" not in calibration.provenance.summary()
