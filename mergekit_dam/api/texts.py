"""Texts as a Python program has them: a source as `calibration` takes it, or documents in memory.

A merge reads its texts more than once and keeps their digests, so documents in memory are written
into a temporary folder.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_dam.errors import CalibrationError

Text: TypeAlias = str | os.PathLike[str] | Sequence[str]
"""A file, a folder, the id of a dataset or `self`, with options; or documents, a text each."""


def documents_of(text: Any, owner: str) -> list[str] | None:
    """The documents of a text in memory; None if it is the name of a source.

    Args:
        owner: What the text is for, for messages.

    Raises:
        CalibrationError: It is neither, or there is no word in it.
    """
    if isinstance(text, (str, os.PathLike)):
        return None
    if not isinstance(text, Sequence) or not all(isinstance(own, str) for own in text):
        raise CalibrationError(
            f"the text of {owner}: required a path or a list of strings, a document each, "
            f"got {type(text).__name__}"
        )
    if not any(own.strip() for own in text):
        raise CalibrationError(
            f"the text of {owner}: required a list of documents, got {len(text)} without a word"
        )
    return list(text)


def written(documents: Sequence[str], file: Path) -> Path:
    """Write documents as JSON lines; a lone surrogate, which is no text, is refused.

    Raises:
        CalibrationError: The document that UTF-8 cannot hold.
    """
    with file.open("w", encoding="utf-8") as handle:
        for number, document in enumerate(documents):
            try:
                document.encode()
            except UnicodeEncodeError as error:
                raise CalibrationError(
                    f"document {number} of {file.stem} cannot be written as UTF-8 "
                    f"({error.reason}); replace the character"
                ) from error
            handle.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    return file
