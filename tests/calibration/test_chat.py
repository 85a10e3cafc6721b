"""Chats are written with the model's own template, special tokens once."""

from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.errors import CalibrationError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CHAT = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over a lazy dog"},
]
TEXT = "<s>[user] the quick brown fox</s>[assistant] jumps over a lazy dog</s>"


@pytest.mark.parametrize("column", ["messages", "conversation"])
def test_a_chat_becomes_the_templates_text(
    write: Any, load: Any, chat_tokenizer: Any, column: str
) -> None:
    # Short enough to stay whole: pieces are cut at twice the sequence length.
    source = write("a.jsonl", [{column: CHAT}])
    ids = chat_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    option = "" if column == "messages" else f":column={column}"
    loaded = load(source + option, tokenizer=chat_tokenizer, samples=1, sequence_length=len(ids))
    assert loaded.tokens[0].tolist() == ids
    assert ids.count(chat_tokenizer.bos_token_id) == 1


def test_parquet_fills_absent_keys_with_null_and_they_do_not_count(
    tmp_path: Path, load: Any, chat_tokenizer: Any
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.tools is defined %}T{% endif %}{{ m.content }}{% endfor %}",
        encoding="utf-8",
    )
    chat = [{**CHAT[0], "tools": "x"}, {**CHAT[1], "tools": None}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [chat]}), path)
    text = "Tthe quick brown foxjumps over a lazy dog"
    ids = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    loaded = load(
        f"{path}:chat_template={template}",
        tokenizer=chat_tokenizer,
        samples=1,
        sequence_length=len(ids),
    )
    assert loaded.tokens[0].tolist() == ids


def test_a_long_chat_is_cut_and_goes_on_as_plain_text(
    write: Any, load: Any, chat_tokenizer: Any
) -> None:
    long = [{"role": "user", "content": "the quick brown fox " * 30}]
    provenance = load(write("a.jsonl", [{"messages": long}]), tokenizer=chat_tokenizer).provenance
    assert any("1 documents longer than" in cut for cut in provenance.cut)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": [{"role": "tool", "content": "a"}]}],
            "line 1: the model's chat template refuses this chat: roles must alternate",
        ),
        (
            [{"messages": [{"author": "human", "value": "a"}]}],
            "line 1: 'messages': message 1 must have a `role` .* it has the keys 'author', 'value'",
        ),
        ([{"messages": [{"role": "user"}]}], "'messages': message 1 must have"),
        ([{"messages": [{"role": "user", "content": "a"}, "b"]}], "got a list of dict and str"),
        ([{"messages": []}], r"holds no text \(1 empty documents\)"),
    ],
)
def test_a_bad_chat_is_named_with_its_reason(
    write: Any, load: Any, chat_tokenizer: Any, rows: list[Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(write("a.jsonl", rows), tokenizer=chat_tokenizer)


def test_a_chat_without_a_template_is_refused_with_the_remedy(
    write: Any, load: Any, tokenizer: Any
) -> None:
    with pytest.raises(
        CalibrationError,
        match=r"line 1 holds chat messages, but the model's "
        r"tokenizer has no chat template: write `:chat_template=FILE\.jinja`",
    ):
        load(write("a.jsonl", [{"messages": CHAT}]))


def test_a_broken_template_file_is_named(
    tmp_path: Path, write: Any, load: Any, chat_tokenizer: Any
) -> None:
    (tmp_path / "t.jinja").write_text("{% for %}", encoding="utf-8")
    source = write("a.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"t\.jinja refuses this chat"):
        load(f"{source}:chat_template={tmp_path}/t.jinja", tokenizer=chat_tokenizer)
    with pytest.raises(CalibrationError, match=r"the chat template .* cannot be read"):
        load(f"{source}:chat_template={tmp_path}", tokenizer=chat_tokenizer)
