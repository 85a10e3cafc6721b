"""Rows as people who fine-tune store them are recognised by their columns, or by `:format=`."""

import json
from typing import Any

import pytest

from mergekit_dam.errors import CalibrationError
from tests.kit.chats import chats, openai, rendered, require_all, sharegpt

CHATS = chats(12)
TEXTS = [rendered(turns) for turns in CHATS]
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add them.\n\n### Input:\n{}\n\n### Response:\n{}"
)
"""The prompt of stanford_alpaca's train.py, for an instruction with an input."""


def pair(turns: Any) -> tuple[str, str]:
    return turns[0][1], turns[1][1]


BAD = [{"role": "assistant", "content": "no"}]
ROWS: dict[str, tuple[str, Any]] = {
    "messages": ("chat messages", lambda turns: {"messages": openai(turns), "id": 1}),
    "conversations": ("chat messages", lambda turns: {"conversations": openai(turns)}),
    "sharegpt": ("ShareGPT", lambda turns: {"conversations": sharegpt(turns), "id": "a_0"}),
    "list": ("chat messages", openai),
    "json": ("chat messages", lambda turns: {"messages": json.dumps(openai(turns))}),
    "json in text": ("chat messages", lambda turns: {"text": json.dumps(openai(turns))}),
    "python": ("ShareGPT", lambda turns: {"conversations": str(sharegpt(turns))}),
    "chat completion": (
        "prompt and completion",
        lambda turns: {"prompt": openai(turns)[:1], "completion": openai(turns)[1:]},
    ),
    "preference": (
        "preference pairs (the chosen answer)",
        lambda turns: {
            "prompt": openai(turns)[:1],
            "chosen": openai(turns)[1:],
            "rejected": BAD,
        },
    ),
    "implicit preference": (
        "preference pairs (the chosen answer)",
        lambda turns: {"chosen": openai(turns), "rejected": [*openai(turns)[:1], *BAD]},
    ),
    "preference with a text": (
        "preference pairs (the chosen answer)",
        lambda turns: {"prompt": pair(turns)[0], "chosen": openai(turns), "rejected": BAD},
    ),
    "preference of llama-factory": (
        "preference pairs (the chosen answer)",
        lambda turns: {
            "conversations": sharegpt(turns)[:1],
            "chosen": sharegpt(turns)[1],
            "rejected": {"from": "gpt", "value": "no"},
        },
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_of_a_chat_gives_the_chat_and_is_said(
    write: Any, load: Any, chat_tokenizer: Any, name: str
) -> None:
    title, row = ROWS[name]
    source = write("a.jsonl", [row(turns) for turns in CHATS])
    provenance = require_all(load, source, TEXTS, chat_tokenizer).provenance
    assert provenance.read_as == f"{title}, 12 chats, template of org/math"
    assert f"read as {provenance.read_as};" in provenance.summary()


def test_alpaca_is_a_chat_of_the_models_template(
    write: Any, load: Any, chat_tokenizer: Any
) -> None:
    rows = [
        {"instruction": "Add them.", "input": question, "output": answer}
        for question, answer in map(pair, CHATS)
    ]
    texts = [
        rendered((("user", f"Add them.\n{question}"), ("assistant", answer)))
        for question, answer in map(pair, CHATS)
    ]
    loaded = require_all(load, write("a.jsonl", rows), texts, chat_tokenizer)
    assert loaded.provenance.read_as == "Alpaca, 12 chats, template of org/math"


@pytest.mark.parametrize("option", ["", ":chat_template=none"])
def test_alpaca_without_a_template_is_written_with_its_own_prompt(
    write: Any, load: Any, tokenizer: Any, chat_tokenizer: Any, option: str
) -> None:
    rows = [
        {"instruction": "Add them.", "input": question, "output": answer}
        for question, answer in map(pair, CHATS)
    ]
    texts = ["<s>" + PROMPT.format(*pair(turns)) for turns in CHATS]
    reader = chat_tokenizer if option else tokenizer
    loaded = require_all(load, write("a.jsonl", rows) + option, texts, reader)
    assert loaded.provenance.read_as == "Alpaca, 12 documents"


def test_alpaca_has_system_and_history_as_llama_factory_writes_them(
    write: Any, load: Any, chat_tokenizer: Any
) -> None:
    row = {
        "instruction": "and 3?",
        "input": "",
        "output": "6",
        "system": "Add.",
        "history": [["1 + 2", "3"]],
    }
    turns = (
        ("system", "Add."),
        ("user", "1 + 2"),
        ("assistant", "3"),
        ("user", "and 3?"),
        ("assistant", "6"),
    )
    require_all(load, write("a.jsonl", [row]), [rendered(turns)], chat_tokenizer)


def test_prompt_and_completion_are_one_text(write: Any, load: Any, tokenizer: Any) -> None:
    rows = [{"prompt": f"{i} + 2 = ", "completion": f"{i + 2}."} for i in range(9)]
    texts = [f"<s>{i} + 2 = {i + 2}." for i in range(9)]
    loaded = require_all(load, write("a.jsonl", rows), texts, tokenizer)
    assert loaded.provenance.read_as == "prompt and completion, 9 documents"


def test_a_completion_that_was_rejected_is_not_read(write: Any, load: Any, tokenizer: Any) -> None:
    rows = [{"prompt": "2 + 2 = ", "completion": str(i), "label": i == 4} for i in range(3, 6)]
    provenance = require_all(load, write("a.jsonl", rows), ["<s>2 + 2 = 4"], tokenizer).provenance
    assert provenance.empty_skipped == 2


@pytest.mark.parametrize("with_prompt", [True, False])
def test_the_chosen_text_stands_behind_its_prompt_once(
    write: Any, load: Any, tokenizer: Any, with_prompt: bool
) -> None:
    # Anthropic's HH-RLHF has the whole dialogue in `chosen`.
    ask = "\n\nHuman: 1 + 1?\n\nAssistant: "
    row = {"chosen": f"{ask}2", "rejected": f"{ask}3"}
    rows = [row, {**row, "prompt": ask}, {"prompt": ask, "chosen": "2", "rejected": "3"}]
    source = write("a.jsonl", rows[1:] if with_prompt else rows[:1])
    require_all(load, source, [f"<s>{ask}2"] * (2 if with_prompt else 1), tokenizer)


def test_rows_of_several_formats_are_counted_each(
    write: Any, load: Any, chat_tokenizer: Any
) -> None:
    rows = [{"text": "the fox"}, {"text": None, "conversations": sharegpt(CHATS[0])}]
    source = write("a.jsonl", rows)
    provenance = require_all(load, source, ["<s>the fox", TEXTS[0]], chat_tokenizer).provenance
    assert provenance.read_as == "text, 1 documents and ShareGPT, 1 chats, template of org/math"


def test_the_format_can_be_named(write: Any, load: Any, chat_tokenizer: Any) -> None:
    row = {"text": json.dumps(openai(CHATS[0])), "messages": openai(CHATS[1])}
    source = write("a.jsonl", [row])
    texts = {"text": "<s>" + row["text"], "messages": TEXTS[1]}  # type: ignore[operator]
    for form, text in texts.items():
        require_all(load, f"{source}:format={form}", [text], chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "option", "message"),
    [
        (
            {"text": "a"},
            ":format=alpaca",
            "line 1 is no Alpaca .columns 'instruction' and 'output' or 'response'.; its columns "
            "are 'text'",
        ),
        ("a", ":format=sharegpt", "line 1 is a bare string, which is no ShareGPT"),
        ({"messages": [{"a": 1}]}, "", "message 1 must have a `role` and a `content`"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            "",
            "message 1 is `from` 'alien'; known are human",
        ),
        ({"messages": "[{'role': user}]"}, "", "'messages' is a string that holds no messages"),
        ({"messages": "a"}, ":format=messages", "'messages' is a string that holds no messages"),
        ({"input_ids": "[ 1  2  3]"}, "", "'input_ids' is a string that holds no messages or"),
        (
            {"instruction": "a", "output": "b", "history": "[['a', 'b']"},
            "",
            "'history' must be a list of",
        ),
        ({"messages": [{"role": "a", "content": 3}]}, "", "`content` must be a string or a list"),
        ({"messages": [3.5]}, "", "got a list of float"),
        ({"input_ids": [1]}, ":format=messages", "is no chat messages"),
        ({"text": [1, 2]}, ":format=text", "got a list of int, which is no text"),
        ({"instruction": ["a"], "output": "b"}, "", "'instruction' must be a string; got list"),
        ({"prompt": "a", "completion": 3}, "", "'completion' must be a string or a list of"),
        (
            {"instruction": "a", "output": "b", "history": [["a"]]},
            "",
            r"'history' must be a list of \[request, answer\] pairs",
        ),
        ({"messages": openai(CHATS[0]), "tools": "add"}, "", "`tools` must be a list of tools"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_the_reason(
    write: Any, load: Any, chat_tokenizer: Any, row: Any, option: str, message: str
) -> None:
    place = r"a\.jsonl line 1.*" + message.removeprefix("line 1")
    with pytest.raises(CalibrationError, match=place):
        load(write("a.jsonl", [row]) + option, tokenizer=chat_tokenizer)
