"""What a quantised weight of any kind offers to those who read a checkpoint."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Read = Callable[[str], Tensor]
"""Reads a tensor of a checkpoint by its name, as it is stored."""


class QuantisedWeight(Protocol):
    """One quantised weight; it knows the names of its tensors, and no values."""

    @property
    def stored(self) -> str:
        """Name of the tensor with the codes."""

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""

    @property
    def form(self) -> str:
        """The format in words."""

    def shape(self, codes: tuple[int, ...], read: Read) -> tuple[int, ...]:
        """The weight's shape; of the values, only those that say the shape are read.

        Args:
            codes: shape of the tensor with the codes.

        Raises:
            ArchitectureError: the shapes do not go together.
        """

    def weight(self, read: Read) -> Tensor:
        """The weight that the codes stand for, in a floating-point dtype.

        Raises:
            ArchitectureError: shapes or values do not go together.
        """
