"""Tables in files (Parquet, Arrow) -> rows, a batch at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.calibration.rows import Row, require, without_nulls
from mergekit_dam.errors import CalibrationError

_BATCH = 256  # rows


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a .parquet file with those of `columns` that it has."""
    file = path.as_posix()
    pyarrow = require("pyarrow", needed_for=f"reading {file}")
    parquet = require("pyarrow.parquet", needed_for=f"reading {file}")
    try:
        with parquet.ParquetFile(path) as table:
            wanted = _wanted(table.schema_arrow.names, columns)
            yield from _rows(table.iter_batches(batch_size=_BATCH, columns=wanted), file)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file} is no readable parquet file: {error}") from error


def arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of an .arrow file, a stream (as `datasets` writes it) or a file."""
    file = path.as_posix()
    pyarrow = require("pyarrow", needed_for=f"reading {file}")
    try:
        with pyarrow.memory_map(file) as content:
            yield from _rows(_arrow_batches(pyarrow, content, columns), file)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file} is no readable arrow file: {error}") from error


def _arrow_batches(pyarrow: Any, content: Any, columns: Sequence[str]) -> Iterator[Any]:
    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    reader = pyarrow.ipc.open_file(content) if is_file else pyarrow.ipc.open_stream(content)
    wanted = _wanted(reader.schema.names, columns)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        chosen = batch.select(wanted)
        for start in range(0, chosen.num_rows, _BATCH):
            yield chosen.slice(start, _BATCH)


def _wanted(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns to read; all of them if none is known, as the error then names them."""
    return [name for name in names if name in columns] or list(names)


def _rows(batches: Iterator[Any], file: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file point anywhere, also outside memory
        for value in batch.to_pylist():
            number += 1
            columns = {name: without_nulls(own) for name, own in value.items()}
            yield Row(columns, f"{file} row {number}", file)
