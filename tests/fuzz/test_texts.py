"""Calibration text of any content, in every format: it is read, or refused in our words."""

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.calibration.overlap import Sentences, warn_of_overlap
from tests.kit.damage import changed, changed_json, damaged, deep, values
from tests.kit.guard import guarded

pytestmark = pytest.mark.slow

ROWS: list[dict[str, Any]] = [
    {"text": "some words to learn"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"input_ids": [1, 2, 3, 4]},
]
rows = st.sampled_from(ROWS).flatmap(changed) | st.sampled_from(ROWS) | values


def in_lines(own: list[Any]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in own)


def in_table(own: list[Any]) -> pyarrow.Table | None:
    try:
        return pyarrow.Table.from_pylist([row for row in own if isinstance(row, dict)])
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, UnicodeEncodeError):
        return None  # a table cannot hold such rows


def parquet(own: list[Any]) -> bytes:
    table, file = in_table(own), io.BytesIO()
    if table is not None and table.num_columns:
        with contextlib.suppress(pyarrow.ArrowException):  # there are tables that it cannot hold
            pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def arrow(own: list[Any]) -> bytes:
    table, file = in_table(own), io.BytesIO()
    if table is not None:
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return file.getvalue()


def separated(own: list[Any]) -> bytes:
    return b"text,other\n" + b"\n".join(
        json.dumps(row, ensure_ascii=False).encode(errors="replace") for row in own
    )


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": in_lines,
    "a.json": lambda own: json.dumps(own).encode(),
    "a.csv": separated,
    "a.tsv": separated,
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a.txt": in_lines,
    "a.jsonl.gz": lambda own: gzip.compress(in_lines(own), mtime=0),
    "a.json.zst": lambda own: pyarrow.compress(json.dumps(own).encode(), "zstd", asbytes=True),
}


@pytest.fixture(params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def read(path: Path, tokenizer: PreTrainedTokenizerBase, options: str = "") -> None:
    load_calibration(
        f"{path}{options}",
        model="a model",
        tokenizer=tokenizer,
        samples=1,
        sequence_length=4,
        vocab_size=len(tokenizer),
        seed=0,
    )


@given(data=st.data())
def test_a_file(name: str, tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    content = WRITERS[name](data.draw(st.lists(rows, max_size=3)))
    options = st.sampled_from(["", ":column=text", ":format=messages", ":format=alpaca"])
    with guarded() as folder:
        (folder / name).write_bytes(data.draw(st.just(content) | damaged(content)))
        read(folder / name, tokenizer, data.draw(options))


@given(content=changed_json(ROWS) | deep.map(str.encode))
def test_rows_as_json(tokenizer: PreTrainedTokenizerBase, content: bytes) -> None:
    with guarded() as folder:
        (folder / "a.json").write_bytes(content)
        (folder / "a.jsonl").write_bytes(content)
        read(folder / "a.json", tokenizer)
    with guarded() as folder:
        (folder / "a.jsonl").write_bytes(content)
        read(folder / "a.jsonl", tokenizer)


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}


@given(state=changed_json(STATE), split=st.sampled_from(["", ":split=train", ":split=../x"]))
def test_a_saved_dataset(tokenizer: PreTrainedTokenizerBase, state: bytes, split: str) -> None:
    with guarded() as folder:
        own = folder / "data" / "train"
        own.mkdir(parents=True)
        (own / "state.json").write_bytes(state)
        (folder / "data" / "dataset_dict.json").write_bytes(state)
        (own / "data-00000-of-00001.arrow").write_bytes(arrow([ROWS[0]]))
        read(folder / "data", tokenizer, split)


TEMPLATES = st.sampled_from(
    [
        "{{ messages }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%') }}",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ '{' ",
        "{{ x.y.z }}",
    ]
)


@given(template=TEMPLATES | st.text(max_size=10))
def test_a_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with guarded() as folder:
        (folder / "a.jsonl").write_bytes(in_lines([ROWS[1]] * 3))
        (folder / "t.jinja").write_text(template, encoding="utf-8", errors="replace")
        read(folder / "a.jsonl", tokenizer, f":chat_template={folder / 't.jinja'}")


@given(content=changed_json({"calibration": {"a": {"sentences": "00ff" * 16}}}))
def test_a_report_that_is_searched_for_the_text(content: bytes) -> None:
    with guarded() as folder:
        (folder / "dam_report.json").write_bytes(content)
        warn_of_overlap(folder / "dam_report.json", "text", Sentences())
