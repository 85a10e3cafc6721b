"""Padding in a user's own token ids is no text."""

from typing import Any

import pytest

from mergekit_dam.errors import CalibrationError

IDS = [*range(10, 26)]


def ids_of(loaded: Any) -> list[int]:
    found: list[int] = loaded.tokens.flatten().tolist()
    return found


@pytest.mark.parametrize("column", ["input_ids", "input_ids_1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_that_the_mask_hides_are_left_out(
    write: Any, load: Any, column: str, side: str
) -> None:
    padding, hidden = [1] * 20, [0] * 20
    ids = [*padding, *IDS] if side == "left" else [*IDS, *padding]
    mask = [*hidden, *[1] * 16] if side == "left" else [*[1] * 16, *hidden]
    row = {column: ids, column.replace("input_ids", "attention_mask"): mask, "labels": ids}
    loaded = load(write("a.jsonl", [row]) + ("" if column == "input_ids" else f":column={column}"))
    assert ids_of(loaded) == IDS
    assert "20 token ids of padding were left out" in loaded.provenance.cut


def test_documents_that_share_a_packed_row_are_kept(write: Any, load: Any) -> None:
    # Packing numbers the documents of a row in its mask, from 1.
    row = {"input_ids": [*IDS, 0, 0], "attention_mask": [*[1] * 8, *[2] * 8, 0, 0]}
    assert ids_of(load(write("a.jsonl", [row]))) == IDS


def test_without_a_mask_the_pad_token_at_both_ends_is_padding(
    write: Any, load: Any, tokenizer_factory: Any
) -> None:
    tokenizer = tokenizer_factory()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pad = tokenizer.pad_token_id
    ids = [*IDS[:8], pad, *IDS[8:15]]
    source = write("a.jsonl", [{"input_ids": [pad, pad, *ids, pad, pad, pad]}])
    assert ids_of(load(source, tokenizer=tokenizer)) == ids


def test_one_end_token_stays_where_it_is_the_pad_token_too(
    write: Any, load: Any, tokenizer_factory: Any
) -> None:
    tokenizer = tokenizer_factory()
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    source = write("a.jsonl", [{"input_ids": [*IDS[:15], end, end, end]}])
    assert ids_of(load(source, tokenizer=tokenizer)) == [*IDS[:15], end]


def test_a_mask_of_another_length_is_refused(write: Any, load: Any) -> None:
    row = {"input_ids": IDS, "attention_mask": [1, 1]}
    with pytest.raises(CalibrationError, match="has 16 token ids, but its `attention_mask` has 2"):
        load(write("a.jsonl", [row]))
