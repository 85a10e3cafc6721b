"""Local files -> rows, read lazily, with the files in a seeded order."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_dam.calibration.rows import STANDARD_COLUMNS, Row, permutation, require
from mergekit_dam.calibration.source import SUFFIXES, CalibrationSource
from mergekit_dam.errors import CalibrationError

TEXT_BLOCK = 64 * 2**20  # characters; a larger .txt file becomes several documents of this size
_PARQUET_BATCH = 256  # rows


def find_files(source: CalibrationSource) -> tuple[list[Path], int]:
    """The files of a local source, sorted by name, and the number of ignored files.

    A directory is searched recursively. Hidden files are ignored, and so are files with another
    suffix than .txt, .jsonl, .json and .parquet.

    Raises:
        CalibrationError: If no file is left.
    """
    root = source.path
    if source.kind == "file":
        return [root], 0
    # Sorted by the posix form, as Windows compares paths without regard to case.
    try:
        inside = sorted(
            (path for path in root.rglob("*") if path.is_file()),
            key=lambda path: path.relative_to(root).as_posix(),
        )
    except OSError as error:
        raise CalibrationError(f"{root.absolute()} cannot be searched: {error}") from error
    files = [path for path in inside if _is_readable(path.relative_to(root))]
    if not files:
        raise CalibrationError(
            f"the directory {root.absolute()} holds no {', '.join(SUFFIXES)} file "
            f"({len(inside)} others were ignored): name a directory with calibration text"
        )
    return files, len(inside) - len(files)


def local_rows(files: list[Path], *, column: str | None, seed: int) -> Iterator[Row]:
    """Yield the rows of all files, in the order of their file.

    The order of the files is seeded, so that a limit on the amount of text does not always
    exclude the last names.
    """
    readers = {".txt": _text, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    for index in permutation(len(files), seed=seed):
        path = files[index]
        try:
            yield from readers[path.suffix.lower()](path, column)
        except OSError as error:
            raise CalibrationError(f"{path.as_posix()} cannot be read: {error}") from error


def _is_readable(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return relative.suffix.lower() in SUFFIXES and not hidden


def _text(path: Path, column: str | None) -> Iterator[Row]:
    file = path.as_posix()
    with path.open(encoding="utf-8-sig") as handle:
        start = 0
        while block := _decoded(handle.read, TEXT_BLOCK, origin=file):
            origin = file if start == 0 else f"{file} from character {start}"
            yield Row(block, origin, file)
            start += len(block)
    if start == 0:
        yield Row("", file, file)


def _json_lines(path: Path, column: str | None) -> Iterator[Row]:
    file = path.as_posix()
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            origin = f"{file} line {number}"
            if line.strip():
                yield Row(_row(_parsed(line, origin=origin), column, origin), origin, file)


def _json(path: Path, column: str | None) -> Iterator[Row]:
    """Yield the rows of a .json file, which is parsed as a whole.

    It holds a list of rows, an object with a single list of rows, or an object that is one row.
    """
    file = path.as_posix()
    content = path.read_bytes()
    if not content.strip():
        yield Row("", file, file)
        return
    for number, value in enumerate(_rows_in(_parsed(content, origin=file), file), start=1):
        origin = f"{file} row {number}"
        yield Row(_row(value, column, origin), origin, file)


def _parquet(path: Path, column: str | None) -> Iterator[Row]:
    file = path.as_posix()
    pyarrow = require("pyarrow", needed_for=f"reading {file}")
    parquet = require("pyarrow.parquet", needed_for=f"reading {file}")
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            names = [column] if column is not None else STANDARD_COLUMNS
            wanted = [name for name in names if name in table.schema_arrow.names]
            columns = wanted or None  # if none is known, read all: the error then names them
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{file} row {number}", file)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{file} is no readable parquet file: {error}") from error


def _rows_in(content: Any, file: str) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        if any(name in content for name in STANDARD_COLUMNS):
            return [content]
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1:
            return lists[0]
        raise CalibrationError(
            f"{file}: a .json file must be a list of rows or an object with a single list; this "
            f"object has {len(lists)} lists under the keys {', '.join(map(repr, content))}"
        )
    raise CalibrationError(
        f"{file}: a .json file must be a list of rows or an object with a single list; "
        f"got {type(content).__name__}"
    )


def _row(value: Any, column: str | None, origin: str) -> dict[str, Any] | str:
    if isinstance(value, str) and column is not None:
        raise CalibrationError(
            f"{origin} is a bare string, which has no column {column!r}: remove `column`"
        )
    if isinstance(value, (dict, str)):
        return value
    raise CalibrationError(
        f'{origin}: a row must be an object such as {{"text": "..."}} or a string; '
        f"got {type(value).__name__}"
    )


def _parsed(content: bytes, *, origin: str) -> Any:
    try:
        return json.loads(_decoded(content.decode, "utf-8-sig", origin=origin))
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{origin} is not JSON: {error.msg} at column {error.colno}"
            + (f" of line {error.lineno}" if error.lineno > 1 else "")
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
