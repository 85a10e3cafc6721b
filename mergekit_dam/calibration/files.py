"""Local files -> rows, read lazily, with the files in a seeded order."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mergekit_dam.calibration.columnar import arrow_rows, parquet_rows
from mergekit_dam.calibration.formats import is_row
from mergekit_dam.calibration.rows import LONGEST, Row, permutation, refuse_long, require
from mergekit_dam.calibration.suffixes import compression_of, suffix_of
from mergekit_dam.calibration.values import JsonValues
from mergekit_dam.errors import CalibrationError

TEXT_BLOCK = 64 * 2**20  # characters; a larger .txt file becomes several documents of this size


def local_rows(files: Sequence[Path], *, columns: Sequence[str], seed: int) -> Iterator[Row]:
    """Yield the rows of all files, in the order of their file.

    The order of the files is seeded, so that a limit on the amount of text does not always
    exclude the last names.

    Args:
        files: Files with one of `SUFFIXES`.
        columns: Names of the columns that may be needed; others of a table are not read.
        seed: Seed of the order of the files.
    """
    readers = {
        ".txt": _text,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _separated,
        ".tsv": _separated,
    }
    tables = {".parquet": parquet_rows, ".arrow": arrow_rows}
    for index in permutation(len(files), seed=seed):
        path = files[index]
        suffix = suffix_of(path)
        try:
            if suffix in tables:
                yield from tables[suffix](path, columns)
            else:
                yield from readers[suffix](path)
        except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
            raise CalibrationError(f"{path.as_posix()} cannot be read: {error}") from error


def _bytes_of(path: Path) -> Any:
    """The content of a file, uncompressed while it is read."""
    kind = compression_of(path)
    if kind == ".gz":
        return gzip.open(path, "rb")
    if kind == ".zst":
        pyarrow = require("pyarrow", needed_for=f"reading {path.as_posix()}")
        return io.BufferedReader(pyarrow.input_stream(path.as_posix(), compression="zstd"))
    return path.open("rb")


def _text_of(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_bytes_of(path), encoding="utf-8-sig", newline=newline)


def _text(path: Path) -> Iterator[Row]:
    file = path.as_posix()
    with _text_of(path) as handle:
        start = 0
        while block := _decoded(handle.read, TEXT_BLOCK, origin=file):
            origin = file if start == 0 else f"{file} from character {start}"
            yield Row(block, origin, file)
            start += len(block)
    if start == 0:
        yield Row("", file, file)


def _json_lines(path: Path) -> Iterator[Row]:
    file = path.as_posix()
    with _bytes_of(path) as handle:
        lines = iter(partial(handle.readline, LONGEST + 1), b"")
        for number, line in enumerate(lines, start=1):
            origin = f"{file} line {number}"
            refuse_long(len(line), origin)
            if line.strip():
                yield Row(_row(_parsed(line, origin=origin), origin), origin, file)


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of a .json file.

    It holds a list of rows, rows one after the other (JSON lines), an object with a single list
    of rows, or an object that is one row.
    """
    file = path.as_posix()
    with _text_of(path) as handle:
        values = JsonValues(lambda size: _decoded(handle.read, size, origin=file), file=file)
        first = values.peek()
        if not first:
            yield Row("", file, file)
            return
        for number, value in enumerate(_rows_in(values, first, file), start=1):
            origin = f"{file} row {number}"
            yield Row(_row(value, origin), origin, file)


def _rows_in(values: JsonValues, first: str, file: str) -> Iterator[Any]:
    if first == "[":
        yield from values.elements()
        return
    value = values.value()
    if values.peek():  # JSON lines
        yield value
        while values.peek():
            yield values.value()
    elif not isinstance(value, dict):
        raise CalibrationError(
            f"{file}: a .json file must be a list of rows or an object with a single list; "
            f"got {type(value).__name__}"
        )
    elif is_row(value):
        yield value
    else:
        lists = [own for own in value.values() if isinstance(own, list)]
        if len(lists) != 1:
            raise CalibrationError(
                f"{file}: a .json file must be a list of rows, rows one after the other (JSON "
                f"lines) or an object with a single list; this object has {len(lists)} lists "
                f"under the keys {', '.join(map(repr, value))}"
            )
        yield from lists[0]


def _separated(path: Path) -> Iterator[Row]:
    """Yield the rows of a .csv or .tsv file, whose first row names the columns."""
    file = path.as_posix()
    csv.field_size_limit(LONGEST)
    with _text_of(path, newline="") as handle:
        lines = _lines(handle, file)
        head = next(lines, "")
        # Where a comma is the decimal point, spreadsheets separate by semicolons.
        comma = ";" if ";" in head and "," not in head else ","
        tab = suffix_of(path) == ".tsv"
        table = csv.reader(chain([head], lines), delimiter="\t" if tab else comma, strict=True)
        try:
            names = next(table, [])
            for number, fields in enumerate(table, start=1):
                if fields:  # else the line is empty
                    origin = f"{file} row {number}"
                    yield Row(_named(names, fields, origin), origin, file)
        except csv.Error as error:
            raise CalibrationError(
                f"{file} line {table.line_num} is no readable table ({error}): mend the quotes, "
                "or convert it to .jsonl"
            ) from error


def _lines(handle: io.TextIOWrapper, file: str) -> Iterator[str]:
    while line := _decoded(handle.readline, LONGEST + 1, origin=file):
        refuse_long(len(line), f"a line of {file}")
        yield line


def _named(names: Sequence[str], fields: Sequence[str], origin: str) -> dict[str, Any]:
    if len(fields) > len(names):
        raise CalibrationError(
            f"{origin} has {len(fields)} fields, but the first row names {len(names)} columns "
            f"({', '.join(map(repr, names))}): quote fields that hold the separator"
        )
    return dict(zip(names, fields, strict=False))


def _row(value: Any, origin: str) -> dict[str, Any] | str:
    if isinstance(value, (dict, str)):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {"messages": value}
    raise CalibrationError(
        f'{origin}: a row must be an object such as {{"text": "..."}}, a list of messages or a '
        f"string; got {type(value).__name__}"
    )


def _parsed(content: bytes, *, origin: str) -> Any:
    try:
        return json.loads(_decoded(content.decode, "utf-8-sig", origin=origin))
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{origin} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        raise CalibrationError(f"{origin} cannot be parsed as JSON: {error}") from error


def _decoded(read: Any, argument: Any, *, origin: str) -> str:
    try:
        text: str = read(argument)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{origin} is not UTF-8 text ({error.reason}): convert it to UTF-8, or leave it out"
        ) from error
    return text
