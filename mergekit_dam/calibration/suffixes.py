"""Suffixes of the files that are read."""

from pathlib import Path

LINES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*LINES, ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")  # of `LINES` alone; tables are compressed inside


def suffix_of(path: str | Path) -> str:
    """The suffix that says how a file is read: ".jsonl" of `a.JSONL` and `a.jsonl.gz`.

    It is empty if the file is not read.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    last = suffixes.pop() if suffixes else ""
    if last in COMPRESSED:
        last = suffixes.pop() if suffixes else ""
        return last if last in LINES else ""
    return last if last in SUFFIXES else ""


def compression_of(path: str | Path) -> str:
    """The last suffix if it is one of `COMPRESSED`, otherwise an empty string."""
    last = Path(path).suffix.lower()
    return last if last in COMPRESSED else ""
