"""Entries of axolotl's `datasets:` mean values of `calibration:`."""

from typing import Any

import pytest

from mergekit_dam.calibration.entries import as_value
from mergekit_dam.errors import CalibrationError


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "org/c", "type": "completion"}, "org/c:format=text"),
        (
            {"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"},
            "mhenrichsen/alpaca_2k_test:format=alpaca:chat_template=none",
        ),
        (
            {"path": "org/c", "type": "chat_template", "split": "train", "name": "de"},
            "org/c:format=messages:split=train:name=de",
        ),
        (
            {"path": "org/c", "type": "chat_template.default", "field_messages": "dialog"},
            "org/c:format=messages:column=dialog",
        ),
        (
            {
                "path": "org/c",
                "type": "chat_template",
                "chat_template": "tokenizer_default",
                "message_property_mappings": {"role": "from", "content": "value"},
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            },
            "org/c:format=messages",
        ),
        ({"path": "org/c", "type": "completion", "field": "b"}, "org/c:format=text:column=b"),
        ({"path": "org/c", "revision": "v1", "samples": 64}, "org/c@v1:samples=64"),
    ],
)
def test_an_entry_is_the_text_that_means_the_same(entry: dict[str, Any], expected: str) -> None:
    assert as_value(entry) == expected


def test_the_training_split_of_a_file_is_the_file(write: Any) -> None:
    path = write("a.jsonl", [{"text": "a"}])
    assert as_value({"path": path, "ds_type": "json", "split": "train"}) == path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "alpaca"}, "an entry must have a `path`"),
        ({"path": "a", "type": "chatml.intel"}, "`type: chatml.intel` is not known .alpaca, chat"),
        ({"path": "a", "type": {"field_instruction": "q"}}, "is not known"),
        ({"path": "a", "shards": 10}, "the entry of 'a': `shards` is not read; known are path"),
        (
            {"path": "a", "message_property_mappings": {"role": "who", "content": "said"}},
            "`message_property_mappings` is not read",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        as_value(entry)
