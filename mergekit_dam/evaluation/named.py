"""`NAME=WHAT` on a command line, models and texts named so; nothing slow is imported."""

import re
from collections.abc import Sequence
from pathlib import Path

from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.errors import CalibrationError, DamError
from mergekit_dam.untrusted import exists

MEAN = "mean"
"""Name of the column with the mean over all texts."""

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_UNREAD = ("share", "start")


def split_name(text: str) -> tuple[str | None, str]:
    """The name and the rest of `NAME=REST`; None and all of it where there is no name."""
    found = _NAMED.fullmatch(text)
    if found is None or exists(text):
        return None, text
    return found[1], found[2]


def named_models(values: Sequence[str], reserved: str | None = None) -> dict[str, str]:
    """Models by name, in the order given; each is `NAME=MODEL` or a model, which is its name.

    Args:
        reserved: a name that something else has.

    Raises:
        DamError: two models have one name.
    """
    found: dict[str, str] = {}
    for name, model in map(split_name, values):
        own = name or model
        if own == reserved:
            raise DamError(f"{own!r} is the name of the average: write another NAME={model}")
        if found.setdefault(own, model) != model:
            raise DamError(f"{own!r} is the name of two models: write another NAME={model}")
    return found


def text_source(text: str) -> CalibrationSource:
    """A text to judge by; it is read as `calibration` reads it.

    Raises:
        CalibrationError: It is missing, or an option is wrong or has no meaning here.
    """
    source = CalibrationSource.parse(text)
    unread = [name for name in _UNREAD if getattr(source, name) is not None]
    if unread:
        raise CalibrationError(
            f"{text!r}: `{unread[0]}` is for calibration text alone: remove `{unread[0]}`"
        )
    if source.kind == "self":
        raise CalibrationError(
            f"{text!r}: a model's own text judges nothing: name a file, a folder or a dataset"
        )
    return source


def named_texts(values: Sequence[str | Path]) -> dict[str, CalibrationSource]:
    """Texts by name, in the order given; each is `NAME=SOURCE` or a source alone.

    Without a name, it is the stem of the path, or the whole of it if the stem is not unique.

    Raises:
        CalibrationError: Everything that is wrong with them.
    """
    problems: list[str] = []
    found: list[tuple[str | None, CalibrationSource]] = []
    for value in values:
        name, text = split_name(str(value))
        try:
            found.append((name, text_source(text)))
        except CalibrationError as error:
            problems.append(error.message)
    stems = [Path(source.location).stem for name, source in found if name is None]
    texts: dict[str, CalibrationSource] = {}
    for name, source in found:
        stem = Path(source.location).stem
        own = name or (stem if stems.count(stem) == 1 else Path(source.location).as_posix())
        if own in texts or own == MEAN:
            why = "the name of the mean" if own == MEAN else "the name of two texts"
            problems.append(f"{own!r} is {why}: write another NAME={source.text}")
        texts[own] = source
    if problems:
        raise CalibrationError("\n".join(problems))
    return texts
