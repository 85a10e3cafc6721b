"""What keeps or sends the numbers of a merge."""

from collections.abc import Mapping
from typing import Protocol


class Backend(Protocol):
    """Takes numbers, which may come from any program of this kind."""

    def put(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Take numbers.

        Args:
            group: what they belong to, as a word of letters, digits and underscores.
            values: numbers by such words; they may be infinite or not a number.
            step: number of the step that they are of, which has a scale of its own in each group.
        """

    def close(self, *, failed: bool) -> None:
        """Take no more; all is written or sent when it returns.

        Args:
            failed: whether the merge failed or was stopped.
        """
