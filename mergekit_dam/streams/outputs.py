"""Outputs of units that are kept while a part is walked, where there is room for them.

The walk comes back to the same data for every stage. What a teacher's units put out does not
change, nor does what settled linears of the merged part put out: kept, it is computed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mergekit_dam.streams.storage import DiskTensor, Storage, TensorFile

Outputs = dict[str, Tensor]


@dataclass
class OutputCache:
    """Outputs by unit name, of every chunk of every stream.

    Attributes:
        storage: says where they go.
        keep: whether outputs are kept at all; decided once a part, None before.
    """

    storage: Storage = field(default_factory=Storage)
    keep: bool | None = None
    _outputs: dict[tuple[int, int], dict[str, Tensor | DiskTensor]] = field(default_factory=dict)

    def of(
        self, source: int, chunk: slice, device: torch.device, *, only: frozenset[str] | None = None
    ) -> Outputs:
        """What is kept of one chunk, on a device; of some units only, if they are named."""
        kept = self._outputs.get((source, chunk.start), {})
        return {
            name: output[:].to(device)
            for name, output in kept.items()
            if only is None or name in only
        }

    def add(self, source: int, chunk: slice, outputs: Mapping[str, Tensor]) -> None:
        """Keep a chunk's outputs, if any are kept."""
        if self.keep:
            own = self._outputs.setdefault((source, chunk.start), {})
            own.update({name: self._put(output) for name, output in outputs.items()})

    def _put(self, output: Tensor) -> Tensor | DiskTensor:
        if self.storage.outputs == "disk":
            return self._file.append(output)
        return output if self.storage.outputs == "device" else output.cpu()

    @cached_property
    def _file(self) -> TensorFile:
        return TensorFile(self.storage.folder)


def outputs_size(outputs: Mapping[str, Tensor]) -> int:
    """Bytes of what units put out."""
    return sum(output.numel() * output.element_size() for output in outputs.values())
