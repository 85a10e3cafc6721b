"""Files as other tools write them: all of the same rows have the same documents and tokens."""

import contextlib
import csv
import gzip
import json
from collections.abc import Callable
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from mergekit_dam.calibration import values
from mergekit_dam.errors import CalibrationError
from tests.kit.chats import chats, rendered, require_all, sharegpt

pandas = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [
    "Grüße, 猫はかわいい 😀",
    'she said "no", twice;\tthen left',
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox",
]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


def excel(path: Path) -> None:
    """As a spreadsheet saves it where the comma is the decimal point: BOM, CRLF, semicolons."""
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        table = csv.writer(handle, dialect="excel", delimiter=";")
        table.writerows([["text", "id"], *([row["text"], row["id"]] for row in ROWS)])


def lines(rows: Any = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def frame() -> Any:
    return pandas.DataFrame(ROWS)


def saved() -> Any:
    return datasets.Dataset.from_list(ROWS)


def zstandard(path: Path) -> None:
    half = len(ROWS) // 2  # two frames, as `cat a.zst b.zst` makes them
    path.write_bytes(
        b"".join(pa.compress(lines(r), "zstd", asbytes=True) for r in (ROWS[:half], ROWS[half:]))
    )


def arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path.as_posix(), table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "json lines": ("a.jsonl", lambda path: path.write_bytes(lines())),
    "json lines in .json": ("a.json", lambda path: path.write_bytes(lines())),
    "ndjson": ("a.ndjson", lambda path: path.write_bytes(lines())),
    "bom and crlf": (
        "a.jsonl",
        lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n")),
    ),
    "a list over many lines": ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=2))),
    "rows over many lines": (
        "a.json",
        lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    ),
    "gzip": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(lines()))),
    "zstandard": ("a.jsonl.zst", zstandard),
    "gzip of a list": (
        "a.json.gz",
        lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    ),
    "pandas csv": ("a.csv", lambda path: frame().to_csv(path, index=False)),
    "pandas csv with its index": ("a.csv", lambda path: frame().to_csv(path)),
    "pandas tsv": ("a.tsv", lambda path: frame().to_csv(path, sep="\t", index=False)),
    "pandas gzip": ("a.csv.gz", lambda path: frame().to_csv(path, index=False)),
    "pandas records": ("a.json", lambda path: frame().to_json(path, orient="records")),
    "pandas lines": ("a.jsonl", lambda path: frame().to_json(path, orient="records", lines=True)),
    "pandas parquet": ("a.parquet", lambda path: frame().to_parquet(path)),
    "a spreadsheet": ("a.csv", excel),
    "datasets json": ("a.json", lambda path: saved().to_json(path)),
    "datasets csv": ("a.csv", lambda path: saved().to_csv(path)),
    "datasets parquet": ("a.parquet", lambda path: saved().to_parquet(path)),
    "datasets folder": ("saved", lambda path: saved().save_to_disk(path)),
    "an arrow file": ("a.arrow", arrow_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_document_and_token_is_read(
    tmp_path: Path, load: Any, tokenizer: Any, name: str
) -> None:
    file, writer = WRITERS[name]
    writer(tmp_path / file)
    texts = [f"<s>{text}" for text in TEXTS]
    provenance = require_all(load, f"{tmp_path}/{file}", texts, tokenizer).provenance
    assert provenance.read_as == f"text, {len(TEXTS)} documents"


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "saved"])
def test_a_table_of_chats_is_read_as_chats(
    tmp_path: Path, load: Any, chat_tokenizer: Any, suffix: str
) -> None:
    own = [*chats(6), (("system", "Add."), *chats(1)[0])]
    rows = [{"conversations": sharegpt(turns), "source": "x"} for turns in own]
    path = tmp_path / f"a.{suffix}"
    table = datasets.Dataset.from_list(rows)
    {
        "csv": lambda: pandas.DataFrame(rows).to_csv(path),  # lists as Python prints them
        "parquet": lambda: table.to_parquet(path),
        "jsonl": lambda: table.to_json(path),
        "saved": lambda: table.save_to_disk(path),
    }[suffix]()
    texts = [rendered(turns) for turns in own]
    provenance = require_all(load, path.as_posix(), texts, chat_tokenizer).provenance
    assert provenance.read_as == "ShareGPT, 7 chats, template of org/math"


def test_values_that_are_larger_than_a_block_are_read_as_a_whole(
    write: Any, load: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "BLOCK", 7)
    texts = [f"<s>{text}" for text in TEXTS]
    for content in (json.dumps(ROWS, indent=1), lines(), json.dumps({"rows": ROWS})):
        require_all(load, write("a.json", content), texts, tokenizer)


def test_a_list_without_end_is_read_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "BLOCK", 64)
    row = '{"text": "the quick brown fox"}, '
    content = chain("[", cycle(row))
    read = 0

    def some(size: int) -> str:
        nonlocal read
        read += size
        return "".join(islice(content, size))

    found = values.JsonValues(some, file="a.json")
    assert found.peek() == "["
    elements = found.elements()
    for _ in range(500):
        assert next(elements) == {"text": "the quick brown fox"}
    assert read < 500 * len(row) + 3 * 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"text": "a"},\n {"text": ""} 2]',
            "Expecting ',' delimiter at column 15 of line 2",
        ),
        ('[{"text": "a"}]\n[]', "Extra data after the list at column 1 of line 2"),
        ('[{"text": "a"},', "Expecting value at column 16"),
        ('[\n\n{"text": "never ends}]', "Unterminated string starting at at column 10 of line 3"),
        ('{"text": "a"}\n\n{"text": nope}', "Expecting value at column 10 of line 3"),
    ],
)
@pytest.mark.parametrize("block", [5, 2**20])
def test_a_mistake_in_json_is_placed(
    write: Any, load: Any, monkeypatch: pytest.MonkeyPatch, content: str, message: str, block: int
) -> None:
    monkeypatch.setattr(values, "BLOCK", block)
    with pytest.raises(CalibrationError, match=rf"a\.json is not JSON: {message}"):
        load(write("a.json", content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,id\na,b,c\n", "row 1 has 3 fields, but the first row names 2 columns"),
        ("a.csv", 'text\n"a" b"\n', "line 2 is no readable table .* mend the quotes"),
        ("a.csv", "txt\na\n", "row 1 has none of the columns 'text'"),
        ("a.csv", b"text\nGr\xfc\xdfe\n", "is not UTF-8 text"),
        ("a.csv", "", "holds no text"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines() * 9)[:-20], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst cannot be read"),
        ("a.arrow", b"no arrow", "is no readable arrow file"),
        ("a.parquet.gz", b"", r"'\.gz' files are not read"),
    ],
)
def test_a_damaged_table_is_named_with_the_reason(
    write: Any, load: Any, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(write(name, content))


def test_an_arrow_file_with_any_damaged_byte_is_read_or_refused(load: Any, tmp_path: Path) -> None:
    """Offsets of a text may point outside of the file."""
    arrow_file(tmp_path / "whole.arrow")
    whole = (tmp_path / "whole.arrow").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x7F
        (tmp_path / "a.arrow").write_bytes(damaged)
        with contextlib.suppress(CalibrationError):
            load(str(tmp_path / "a.arrow"))
