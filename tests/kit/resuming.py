"""Merges that are stopped, and what they write in the end."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mergekit_dam import journal
from mergekit_dam.host import resume
from mergekit_dam.streams import progress
from tests.kit.merging import dam
from tests.kit.models import Models
from tests.kit.texts import Calibration

_TIMES = frozenset({"this_run"})

_SEARCH = {"samples": 6, "holdout": 1 / 3, "batch_size": 2, "learning_rate": 5e-3, "steps": 6}
FITS: dict[str, dict[str, Any]] = {
    "layer, identity": {"objective": "layer", "metric": "identity"},
    "layer, sensitivity": {"objective": "layer", "metric": "sensitivity"},
    "logits": {"objective": "logits", **_SEARCH},
    "layer+logits": {"objective": "layer+logits", "metric": "sensitivity", **_SEARCH},
}
"""Parameters of every kind of fit."""


def configured(models: Models, calibration: Calibration, fit: str, **more: Any) -> dict[str, Any]:
    """A merge with corrections."""
    own = {"correction": "low_rank", "correction_rank": 2, **FITS[fit], **more}
    return dam(models.models, calibration, base=models.base, **own)


def contents(folder: Path) -> Mapping[str, Any]:
    """Digests of all files of a merge; its report without what clocks and memory say.

    The page that shows the report shows its times, too, and nothing that is not in the report.
    """
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "dam_report.html"
    }
    found["dam_report.json"] = _untimed(json.loads((folder / "dam_report.json").read_text("utf-8")))
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(own) for key, own in value.items() if key not in _TIMES}
    return [_untimed(own) for own in value] if isinstance(value, list) else value


class Stopped(BaseException):
    """Like ctrl-C, which would end the tests."""


@dataclass
class Told:
    """What a merge shows on its way, and what it continues behind."""

    shown: list[str] = field(default_factory=list)
    continued: list[str] = field(default_factory=list)

    def parts(self, word: str) -> list[str]:
        """Parts of the model that lines tell of that begin with a word, in order, once each."""
        found = [" ".join(line.split()[:2]) for line in self.shown if line.startswith(word)]
        return list(dict.fromkeys(found))


@contextmanager
def watched(stop: str | None = None, *, error: BaseException | None = None) -> Iterator[Told]:
    """Watch a merge that keeps every boundary.

    Args:
        stop: beginning of the line of progress at which it is stopped.
        error: what is raised there.
    """
    told = Told()

    def show(text: str, **_: object) -> None:
        told.shown.append(text)
        if stop is not None and text.startswith(stop):
            raise error or Stopped

    stock = resume.LOG.warning

    def warn(text: str, *values: object) -> None:
        stock(text, *values)
        if text.startswith("continuing"):
            told.continued.append(text % values)

    with (
        mock.patch.object(progress, "show", show),
        mock.patch.object(resume.LOG, "warning", warn),
        mock.patch.object(journal, "SHARE", float("inf")),
    ):
        yield told
