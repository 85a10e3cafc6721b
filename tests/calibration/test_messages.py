"""Messages with parts, tools and calls, and what templates make of them."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.errors import CalibrationError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ASK, ANSWER = {"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}def {{ t.function.name }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{{ 'says ' + m.content }}{% endfor %}"
)
"""It fails on a message whose content is missing or null."""


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def whole(load: Any, source: str, tokenizer: Any, template: str = TEMPLATE) -> str:
    """The text of all documents of a source."""
    tokenizer = with_template(tokenizer, template)
    with pytest.raises(CalibrationError) as caught:
        load(source, tokenizer=tokenizer, samples=1, sequence_length=10**6)
    held = re.search(r"holds ([\d,]+) tokens in", str(caught.value))
    assert held, caught.value
    length = int(held[1].replace(",", ""))
    loaded = load(source, tokenizer=tokenizer, samples=1, sequence_length=length)
    return str(tokenizer.decode(loaded.tokens[0].tolist()))


def test_parts_of_a_content_are_one_text_and_images_are_counted(
    write: Any, load: Any, chat_tokenizer: Any
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = [{"type": "text", "text": "the quick"}, image, {"type": "text", "text": "brown fox"}]
    source = write("a.jsonl", [{"messages": [{**ASK, "content": parts}, ANSWER]}])
    text = whole(load, source, chat_tokenizer)
    assert text == "<s>[user] says the quick\nbrown fox[assistant] says 3"
    said = "1 parts of messages (type 'image_url') were left out: they are no text"
    assert said in load(source, tokenizer=chat_tokenizer, samples=1).provenance.cut


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("form", ["absent", "null", "older", "sharegpt"])
def test_a_call_of_a_tool_needs_no_content(
    write: Any, load: Any, chat_tokenizer: Any, arguments: Any, form: str
) -> None:
    call = {"name": "add", "arguments": arguments}
    calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    message = {
        "absent": calls,
        "null": {**calls, "content": None},
        "older": {"role": "assistant", "content": None, "function_call": call},
        "sharegpt": {"from": "function_call", "value": json.dumps(call)},
    }[form]
    result = {"role": "tool", "content": "3"}
    source = write("a.jsonl", [{"messages": [ASK, message, result, ANSWER]}])
    assert whole(load, source, chat_tokenizer) == (
        '<s>[user] says 1 + 2[assistant] add({"a": 1})says [tool] says 3[assistant] says 3'
    )


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_template_gets_the_tools_of_a_row(
    tmp_path: Path, write: Any, load: Any, chat_tokenizer: Any, tools: Any, suffix: str
) -> None:
    row = {"messages": [ASK, ANSWER], "tools": tools}
    source = write("a.jsonl", [row])
    if suffix == "parquet":
        source = (tmp_path / "a.parquet").as_posix()
        pq.write_table(pa.Table.from_pylist([row]), source)
    assert whole(load, source, chat_tokenizer) == "<s>def add[user] says 1 + 2[assistant] says 3"


def test_keys_that_a_table_fills_with_null_are_absent_inside_of_calls(
    tmp_path: Path, load: Any, chat_tokenizer: Any
) -> None:
    functions = [{"name": "f", "arguments": own} for own in ({"a": 1}, {"b": 2})]
    message = {
        "role": "assistant",
        "content": "so",
        "tool_calls": [{"function": function} for function in functions],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [[message]]}), path)
    text = whole(load, path.as_posix(), chat_tokenizer)
    assert text == '<s>[assistant] f({"a": 1})f({"b": 2})says so'


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("%d %b %Y", "26 Jul 2024"),
        ("%Y-%m-%d", "2024-07-26"),
        ("%B %-d, %Y at %H:%M", "July 26, 2024 at 00:00"),
    ],
)
def test_a_template_that_asks_for_the_date_is_given_the_same_one_on_every_day(
    write: Any, load: Any, chat_tokenizer: Any, asked: str, written: str
) -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('" + asked + "') }}{% endif %}"
    template += "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    source = write("a.jsonl", [{"messages": [ASK, ANSWER]}])
    assert whole(load, source, chat_tokenizer, template) == f"{written}[user] 1 + 2[assistant] 3"
    tokenizer = with_template(chat_tokenizer, template)
    cut = load(source, tokenizer=tokenizer, samples=1, sequence_length=4).provenance.cut
    assert any("writes today's date; it is given 26 Jul 2024" in sentence for sentence in cut)


def test_a_template_of_a_vision_model_that_reads_parts_alone_gets_parts(
    write: Any, load: Any, chat_tokenizer: Any
) -> None:
    # As LLaVA's: it goes through the parts of the content, and drops a string.
    template = (
        "{% for m in messages %}{{ m.role }}: {% for part in m['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    source = write("a.jsonl", [{"messages": [ASK, ANSWER]}])
    assert whole(load, source, chat_tokenizer, template) == "user: 1 + 2assistant: 3"


def test_code_that_looks_like_a_list_stays_text(write: Any, load: Any, tokenizer: Any) -> None:
    texts = [r"['\d', 'role', print('the quick brown fox')]", "[1, 2, 3]", '{"a": [1]}', "[]"]
    provenance = load(write("a.jsonl", [{"text": text} for text in texts])).provenance
    assert provenance.read_as == "text, 4 documents"
