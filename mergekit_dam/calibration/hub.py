"""A dataset on the Hugging Face Hub -> rows, streamed."""

from collections.abc import Iterator, Sequence
from typing import Any

from mergekit_dam.calibration.rows import Row, require, without_nulls
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.errors import CalibrationError, first_line

DEFAULT_SPLIT = "train"
SHUFFLE_BUFFER = 1000  # documents; the shards are shuffled too


def resolve_revision(source: CalibrationSource) -> str | None:
    """The commit that the dataset's revision means now, so that it can be pinned.

    If the Hub does not answer, this is the revision that the user wrote (None for the newest):
    `datasets` may have the dataset in its cache; if it has not, it gives the best error.
    """
    hub = require("huggingface_hub", needed_for=f"the dataset {source.location!r}")
    try:
        info = hub.HfApi().dataset_info(source.location, revision=source.revision, timeout=10)
    except Exception:  # many libraries may raise one; none of them may stop the merge
        return source.revision
    commit: str | None = info.sha
    return commit or source.revision


def hub_rows(
    source: CalibrationSource, *, columns: Sequence[str], revision: str | None, seed: int
) -> Iterator[Row]:
    """Yield the rows of a Hub dataset in a seeded order; downloads them when they are needed.

    Of the columns, those of `columns` are read, or all if the dataset has none of these.

    Raises:
        CalibrationError: If the dataset, its configuration or split is not found, or if the Hub
            cannot be reached.
    """
    split = source.split or DEFAULT_SPLIT
    origin = f"{source.location} ({split})"
    datasets = require("datasets", needed_for=f"the Hub dataset {source.location!r}")
    try:
        dataset = datasets.load_dataset(
            source.location, name=source.name, split=split, revision=revision, streaming=True
        )
        wanted = [name for name in dataset.column_names or () if name in columns]
        if wanted:  # others may be images, which would be decoded
            dataset = dataset.select_columns(wanted)
        shuffled = dataset.shuffle(seed=seed % 2**32, buffer_size=SHUFFLE_BUFFER)
        for number, value in enumerate(shuffled, start=1):
            row = {name: without_nulls(own) for name, own in value.items()}
            yield Row(row, f"{origin} document {number} of the shuffled stream")
    except Exception as error:  # every file format and transport has exceptions of its own
        raise CalibrationError(_explain(error, source, split, datasets)) from error


def _explain(error: Exception, source: CalibrationSource, split: str, datasets: Any) -> str:
    name, said = source.location, first_line(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"{name!r} is neither a path here ({source.path.absolute()} does not exist) nor a "
            f"dataset that the Hub shows you ({said}): correct the id, or run `hf auth login` "
            "if it is private or gated"
        )
    if isinstance(error, ConnectionError):
        return (
            f"the dataset {name!r} cannot be read because the Hugging Face Hub is out of reach "
            f"({said}): connect, or name a local file; {source.path.absolute()} does not exist"
        )
    if said.startswith("Bad split") or said.startswith("Unknown split"):
        return f"the dataset {name!r} has no split {split!r} ({said}): write `{name}:split=...`"
    if "onfig name is missing" in said or "BuilderConfig" in said:
        found = f"no configuration {source.name!r}" if source.name else "several configurations"
        every = " ".join(str(error).split())
        return f"the dataset {name!r} has {found} ({every}): write `{name}:name=...`"
    return f"the dataset {name!r}, split {split!r}, cannot be read: {type(error).__name__}: {said}"
