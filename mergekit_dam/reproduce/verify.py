"""Is a folder what its lock says?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.lock.folder import files_in, output_of, read_by_others
from mergekit_dam.lock.schema import LOCK_NAME, Lock, Output, read_lock
from mergekit_dam.reproduce.compare import Difference, differences


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        folder: The folder.
        lock: Its lock.
        differences: What is not as the lock says.
    """

    folder: Path
    lock: Lock
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain values."""
        return {
            "verified": not self.differences,
            "files": len(self.lock.output.files) + 1,
            "tensors": len(self.lock.output.tensors),
            "differences": [difference.to_json() for difference in self.differences],
        }

    def __str__(self) -> str:
        output = self.lock.output
        if not self.differences:
            return (
                f"{self.folder}: {len(output.tensors)} tensors and {len(output.files) + 1} files "
                f"are as {LOCK_NAME} says"
            )
        lines = "\n".join(f"  - {difference}" for difference in self.differences)
        return f"{self.folder}: {len(self.differences)} differences from {LOCK_NAME}:\n{lines}"


def verify(folder: Path, *, quiet: bool = False) -> Verdict:
    """Check every file and every tensor of a merged model against its lock.

    A further file counts as a difference if what loads a model may open it.

    Args:
        folder: The folder, with its lock.
        quiet: Whether no progress is shown.

    Raises:
        DamError: There is no lock that can be read, or a file is damaged.
    """
    lock = read_lock(folder)
    present = files_in(folder)
    counted = [n for n in present if n in lock.output.files or read_by_others(n)]
    found = output_of(folder, counted, quiet=quiet, intact=False)
    return Verdict(folder, lock, tuple(_all(lock.output, found)))


def _all(locked: Output, found: Output) -> list[Difference]:
    own = differences(locked, found)
    if found.report != locked.report:
        how = "other values" if found.report else "missing, or damaged"
        own.append(Difference("file", REPORT_NAME, how))
    return own
