"""TODO mergekit_dam/search/data.py."""

import dataclasses

from torch import Tensor

from mergekit_dam.streams.share import Split, border, numbers_within, own_border
from mergekit_dam.streams.storage import Sequences
from mergekit_dam.streams.stream import Stream


@dataclasses.dataclass(frozen=True)
class Data:
    """One model's calibration data, and what that model makes of it.

    Attributes:
        source: index of the model among the sources.
        weight: how much its data counts.
        tokens: int64 `[sequences, length]`.
        teacher: what leaves the model's last block, fp32 `[sequences, length, hidden]`.
        held_out: the last so many sequences of all only judge.
        numbers: which of all sequences these are; up to their number. None: they are all.
    """

    source: int
    weight: float
    tokens: Tensor
    teacher: Sequences
    held_out: int
    numbers: range | None = None

    @property
    def own(self) -> range:
        """Numbers of the sequences, among all."""
        return range(len(self.tokens)) if self.numbers is None else self.numbers

    def of(self, split: Split) -> "Data":
        """The sequences of one split."""
        first, last = own_border(self.own, self.held_out, split)
        all_of_it = border(self.own.stop, self.held_out, split)
        return dataclasses.replace(
            self,
            tokens=self.tokens[first:last],
            teacher=self.teacher.narrow(0, first, last - first),
            held_out=0 if split == "fit" else self.held_out,
            numbers=numbers_within(self.own, *all_of_it),
        )

    def stream(self, merged: Sequences) -> Stream:
        """The data at the end of the last block."""
        return Stream(self.source, self.teacher, merged, self.held_out, numbers=self.numbers)
