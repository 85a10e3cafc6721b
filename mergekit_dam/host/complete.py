"""What a merge must have written before its model takes its place."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open

from mergekit_dam.coefficients.file import FILE_NAME
from mergekit_dam.errors import CheckpointError, DamError, first_line
from mergekit_dam.host import report
from mergekit_dam.host.files import stored_index

_CARD = ("README.md", "mergekit_config.yml")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check_complete(folder: Path, options: MergeOptions, *, tokenizer: bool) -> None:
    """Check that a merge has written all its files, and that they can be read.

    Args:
        folder: folder of the merged model.
        options: mergekit's options.
        tokenizer: whether the merge makes a tokenizer.

    Raises:
        DamError: a file is missing or damaged; the message names it.
    """
    required = ["config.json", FILE_NAME, report.FILE_NAME]
    if options.write_model_card:
        required += _CARD
    missing = [name for name in required if not (folder / name).is_file()]
    if tokenizer and not has_tokenizer(folder):
        missing.append("the tokenizer")
    if missing:
        raise CheckpointError(
            f"the merge has not written {', '.join(missing)}; nothing takes the place of the "
            f"output. The log says what went wrong"
        )
    held = {name for file in folder.glob("*.safetensors") for name in _names(file)}
    index = stored_index(folder)
    lacking = sorted(set(index.tensor_paths) - held) if index.is_safetensors else []
    if lacking:
        raise CheckpointError(f"the merged model's files lack {lacking[0]}; merge again")
    for file in folder.glob("*.json"):
        json.loads(file.read_text("utf-8"))


def _names(file: Path) -> list[str]:
    """Names of the tensors of a file, whose header is read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read back ({first_line(error)}); check the disk and merge again"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER)


@contextmanager
def tokenizer_must_be_copied() -> Iterator[None]:
    """Make a merge fail where mergekit only logs that the tokenizer could not be copied.

    A model without a tokenizer has none to copy, and is merged all the same.

    Raises:
        DamError: the tokenizer could not be copied.
    """
    merge: Any = importlib.import_module("mergekit.merge")
    stock, failed = merge._copy_tokenizer, []

    def copy(merge_config: Any, out_path: str, options: MergeOptions) -> None:
        try:
            stock(merge_config, out_path, options=options)
        except Exception as error:
            donor, folder = merge._get_donor_model(merge_config, options=options)
            if has_tokenizer(Path(folder)):
                failed.append((donor, error))
            raise

    merge._copy_tokenizer = copy
    try:
        yield
    finally:
        merge._copy_tokenizer = stock
    for donor, error in failed:
        if isinstance(error, OSError):
            raise error
        raise DamError(
            f"{donor}: its tokenizer cannot be copied ({first_line(error)}); with "
            f"`--no-copy-tokenizer` the merge is made without it"
        ) from error
