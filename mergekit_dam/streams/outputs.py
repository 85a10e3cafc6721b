"""Outputs of units that are kept while their part is fitted, where there is room for them.

The fit runs the same data through a part once per group of units. The outputs of a teacher's units
do not change meanwhile, nor do those of merged linears that are fitted already. If they are kept,
they are computed once.
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
    """Outputs by the name of the unit, for every chunk of every stream.

    Attributes:
        storage: says where outputs are kept.
        keep: whether outputs are kept at all; None until that is decided, once per part.
    """

    storage: Storage = field(default_factory=Storage)
    keep: bool | None = None
    _outputs: dict[tuple[int, int], dict[str, Tensor | DiskTensor]] = field(default_factory=dict)

    def of(
        self, source: int, chunk: slice, device: torch.device, *, only: frozenset[str] | None = None
    ) -> Outputs:
        """The outputs that are kept for one chunk, moved to a device.

        Args:
            only: names of the units that are asked for; None asks for all.
        """
        kept = self._outputs.get((source, chunk.start), {})
        return {
            name: output[:].to(device)
            for name, output in kept.items()
            if only is None or name in only
        }

    def add(self, source: int, chunk: slice, outputs: Mapping[str, Tensor]) -> None:
        """Keep the outputs of a chunk, if outputs are kept at all."""
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
    """Bytes of some units' outputs."""
    return sum(output.numel() * output.element_size() for output in outputs.values())


def cache_bytes(teachers: int) -> int:
    """Bytes to find room for, given the bytes of the teachers' outputs.

    The merged part's units put out as much.
    """
    return 2 * teachers
