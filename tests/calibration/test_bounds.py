"""Files that unpack to more than any text has are refused before all of it is in memory."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_dam.calibration import files, rows
from mergekit_dam.calibration.files import local_rows
from mergekit_dam.errors import CalibrationError

LIMIT = 2**20
ENDLESS: dict[str, Callable[[str], str]] = {
    "a.jsonl.gz": lambda text: f'{{"text": "{text}"}}',
    "a.json.gz": lambda text: f'[{{"text": "{text}"}}]',
    "a.csv.gz": lambda text: f"text\n{text}\n",
}


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, rows):
        monkeypatch.setattr(module, "LONGEST", LIMIT)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_row_without_end_is_refused_in_bounded_memory(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(ENDLESS[name]("x" * (64 * LIMIT)).encode()))
    assert file.stat().st_size < LIMIT
    tracemalloc.start()
    with pytest.raises(CalibrationError) as error:
        list(local_rows([file], columns=(), seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"has more than {LIMIT:,} characters" in error.value.message
    assert str(file) in error.value.message
    assert peak < 16 * LIMIT


@pytest.mark.parametrize("name", ENDLESS)
def test_a_row_of_the_largest_size_is_read(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(ENDLESS[name]("x" * (LIMIT - 100)).encode()))
    (row,) = local_rows([file], columns=(), seed=0)
    assert isinstance(row.value, dict)
    assert len(row.value["text"]) == LIMIT - 100
