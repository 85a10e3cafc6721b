"""The value of `calibration:`, parsed and checked before any text is read.

data/math.jsonl                              a file
data/code/:samples=64                        a directory of files, for 64 sequences
data/chats:split=train:format=sharegpt       a cloned dataset, one split of it
org/german-corpus:split=train:column=text    a dataset on the Hugging Face Hub
org/german-corpus@v1.2                       ... at a branch, tag or commit
self                                         what the model itself writes
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergekit_dam.calibration.formats import FORMATS
from mergekit_dam.calibration.suffixes import COMPRESSED, SUFFIXES, suffix_of
from mergekit_dam.calibration.templates import NONE
from mergekit_dam.errors import CalibrationError
from mergekit_dam.untrusted import exists, expanded

OPTIONS = (
    "split",
    "name",
    "column",
    "format",
    "samples",
    "share",
    "chat_template",
    "loss_on",
    "start",
)
SELF = "self"
STARTS = ("text", "chat")
LOSSES = ("assistant", "all")

Kind = Literal["file", "directory", "hub", "self"]

OPTION = re.compile(r":(?=[A-Za-z_]\w*=)")
"""Where an option begins: a colon before `word=`; drive letters and colons in paths stay."""
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[^@:\s]+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSource:
    """The source of one model's calibration text. `parse` makes and checks it.

    Attributes:
        text: The value as the user wrote it.
        location: A path (kind "file" or "directory"), a Hub dataset id (kind "hub"), or "self".
        kind: Kind of the location.
        revision: Branch, tag or commit of a Hub dataset.
        split: Split of a Hub dataset, or of a folder.
        name: Configuration of a Hub dataset.
        column: Column that has the text.
        format: Key of `formats.FORMATS`; None to recognise the format by the columns.
        samples: Number of sequences, in place of the merge's `samples`.
        share: Share of the merge's `samples`, among several sources of one model.
        chat_template: Path of a jinja file, in place of the tokenizer's template; "none" for none.
        loss_on: Which tokens count in losses: those of the "assistant", or "all".
        start: What the model itself writes: "text" or "chat"; None for both, if it has a template.
    """

    text: str
    location: str
    kind: Kind
    revision: str | None = None
    split: str | None = None
    name: str | None = None
    column: str | None = None
    format: str | None = None
    samples: int | None = None
    share: float | None = None
    chat_template: str | None = None
    loss_on: str | None = None
    start: str | None = None

    @property
    def path(self) -> Path:
        """The local file or directory, with `~` expanded; only for local kinds."""
        return expanded(self.location)

    @classmethod
    def parse(cls, text: str) -> "CalibrationSource":
        """Parse `location[:key=value]...`; relative paths start at the working directory.

        The location is the longest beginning of `text` that exists as a path, so that even a path
        with `:word=` in it can be given.

        Raises:
            CalibrationError: With all problems: unknown, repeated or unfit options, and a location
                that neither exists nor looks like a dataset id.
        """
        location, assignments = _split(text.strip())
        options, problems = _read_options(assignments)
        kind = _kind_of(location)
        problems += _value_problems(options)
        problems += _location_problems(location, kind)
        if kind in ("file", "directory"):
            problems += _unfit_for_local(location, kind, options)
        problems += _unfit_for_kind(kind, options)
        if problems:
            raise CalibrationError(f"{text!r}: " + "; ".join(problems))
        revision = None
        if kind == "hub":
            location, _, revision = location.partition("@")
        return cls(
            text=text.strip(),
            location=location,
            kind=kind or "file",
            revision=revision or None,
            samples=_positive(options.pop("samples", "")),
            share=_fraction(options.pop("share", "")),
            **options,
        )


def _split(text: str) -> tuple[str, list[str]]:
    pieces = OPTION.split(text)
    for count in range(len(pieces), 0, -1):
        location = ":".join(pieces[:count])
        if count == 1 or exists(location):
            return location, pieces[count:]
    raise AssertionError("a split has at least one piece")


def _read_options(assignments: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    problems: list[str] = []
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key not in OPTIONS:
            problems.append(f"unknown option {key!r}{_did_you_mean(key)}")
        elif key in options:
            problems.append(f"option `{key}` is given twice")
        elif not value.strip():
            problems.append(f"option `{key}` has no value")
        else:
            options[key] = value.strip()
    return options, problems


def _value_problems(options: dict[str, str]) -> list[str]:
    problems = []
    if "samples" in options and _positive(options["samples"]) is None:
        problems.append(
            f"`samples` must be a whole number above 0, below 10^9; got {options['samples']!r}"
        )
    if "share" in options and _fraction(options["share"]) is None:
        problems.append(f"`share` must be a number between 0 and 1; got {options['share']!r}")
    if "samples" in options and "share" in options:
        problems.append("`samples` and `share` both say how many sequences: give one of them")
    form = options.get("format")
    if form is not None and form not in FORMATS:
        close = difflib.get_close_matches(form.lower(), FORMATS, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        problems.append(f"`format` must be one of {', '.join(FORMATS)}; got {form!r}{hint}")
    if form in FORMATS and FORMATS[form].read is not None and "column" in options:
        problems.append(f"`column` names one column, but `format={form}` reads several: give one")
    template = options.get("chat_template")
    if template and template != NONE and not exists(template):
        problems.append(f"`chat_template` must be an existing jinja file; none at {template!r}")
    counted = options.get("loss_on")
    if counted is not None and counted not in LOSSES:
        problems.append(f"`loss_on` must be one of {', '.join(LOSSES)}; got {counted!r}")
    return problems


def _did_you_mean(key: str) -> str:
    close = difflib.get_close_matches(key.lower(), OPTIONS, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known are {', '.join(OPTIONS)}"


def _kind_of(location: str) -> Kind | None:
    """The kind of source; None if it neither exists as a path nor looks like a dataset id."""
    if location == SELF:
        return "self"  # a folder of this name is `./self`
    if exists(location):
        return "directory" if expanded(location).is_dir() else "file"
    # `data/math.jsonl` could be a dataset id, but a user who writes it means a file.
    if _DATASET.fullmatch(location) and not location.lower().endswith((*SUFFIXES, *COMPRESSED)):
        return "hub"
    return None


def _location_problems(location: str, kind: str | None) -> list[str]:
    if not location:
        return ["no path and no dataset id is given"]
    if kind is None:
        return [
            f"no file or directory at {expanded(location).absolute()}, and "
            f"{location!r} is not the id of a Hub dataset (`org/name`); relative paths "
            "start at the working directory"
        ]
    if kind == "file" and not expanded(location).is_file():
        return [
            "a pipe or a device cannot be read twice, as a merge does; write its text to a file"
        ]
    if kind == "file" and not suffix_of(location):
        suffix = Path(location).suffix
        found = f"{suffix!r} files are" if suffix else "a file without a suffix is"
        return [f"{found} not read; convert to one of {', '.join(SUFFIXES)}"]
    return []


def _unfit_for_local(location: str, kind: str, options: dict[str, str]) -> list[str]:
    problems = []
    if "name" in options:
        problems.append(
            f"`name` is for Hub datasets, but {location!r} is a local path: remove `name` (and "
            "name the folder of that configuration)"
        )
    if "split" in options and kind == "file":
        problems.append(
            f"`split` is for Hub datasets and folders, but {location!r} is a file: remove `split`"
        )
    if suffix_of(location) == ".txt":
        problems += [
            f"`{key}` is for rows, but a .txt file has none: remove `{key}`"
            for key in ("column", "format", "loss_on")
            if options.get(key, "all") != "all"
        ]
    return problems


def _unfit_for_kind(kind: Kind | None, options: dict[str, str]) -> list[str]:
    if kind != "self":
        if "start" not in options:
            return []
        return [f"`start` is for `{SELF}`, the text that the model writes: remove `start`"]
    problems = [
        f"`{key}` is for text that is read, but `{SELF}` is written by the model: remove `{key}`"
        for key in ("split", "name", "column", "format", "loss_on")
        if key in options
    ]
    start = options.get("start")
    if start is not None and start not in STARTS:
        problems.append(f"`start` must be one of {', '.join(STARTS)}; got {start!r}")
    return problems


def _positive(value: str) -> int | None:
    return int(value) if re.fullmatch(r"0*[1-9][0-9]{0,8}", value) else None


def _fraction(value: str) -> float | None:
    try:
        share = float(value)
    except ValueError:
        return None
    return share if 0 < share < 1 else None
