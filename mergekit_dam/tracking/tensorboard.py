"""TensorBoard: a file of events for every run of a merge."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

_EVENTS = "events.out.tfevents"
"""Beginning of the names by which TensorBoard knows its files."""

_FLUSHED_EVERY = 10
"""Seconds after which a number can be seen at the latest."""


class TensorBoard:
    """Writes the events of a run.

    Args:
        place: folder of all runs of the merge; each has its own, `run-1`, `run-2` and so on, since
            a merge that continues goes over some steps again.
        configuration: what is merged, as text.
    """

    def __init__(self, place: Path, configuration: str) -> None:
        self._place = place
        number = 1 + sum(1 for _ in place.glob("run-*"))
        self._writer = SummaryWriter(place / f"run-{number}", flush_secs=_FLUSHED_EVERY)
        code = "".join(f"    {line}\n" for line in configuration.splitlines())  # of Markdown
        self._writer.add_text("configuration", code)

    def put(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write numbers."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self, *, failed: bool) -> None:
        """Write all that is not written yet, and take the name of this machine out of the names."""
        self._writer.close()
        for file in self._place.glob(f"run-*/{_EVENTS}.*"):
            time = file.name.removeprefix(f"{_EVENTS}.").split(".")[0]
            file.rename(file.with_name(f"{_EVENTS}.{time}"))
