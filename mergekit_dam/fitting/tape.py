"""Outputs of units that are kept while a part is walked, as far as they fit in memory.

The walk comes back to the same data for every stage. What a teacher's units put out does not
change, nor does what settled linears of the merged part put out: kept, it is computed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

BUDGET = 4 * 2**30
"""Bytes on the host up to which outputs are kept; beyond it, they are computed again."""

Outputs = dict[str, Tensor]


@dataclass
class Tape:
    """Outputs by unit name, of every chunk of every stream.

    Attributes:
        keep: whether outputs are kept at all; decided once a part, None before.
    """

    keep: bool | None = None
    _outputs: dict[tuple[int, int], Outputs] = field(default_factory=dict)

    def of(self, source: int, chunk: slice) -> Outputs:
        """What is kept of one chunk."""
        return self._outputs.get((source, chunk.start), {})

    def add(self, source: int, chunk: slice, outputs: Mapping[str, Tensor]) -> None:
        """Keep a chunk's outputs on the host, if any are kept."""
        if self.keep:
            own = self._outputs.setdefault((source, chunk.start), {})
            own.update({name: output.cpu() for name, output in outputs.items()})


def fits(outputs: Mapping[str, Tensor], *, tokens: int, of_tokens: int) -> bool:
    """Whether the outputs of teachers and merged part fit, going by those of a first chunk."""
    size = sum(output.numel() * output.element_size() for output in outputs.values())
    return 2 * size * of_tokens <= BUDGET * tokens
