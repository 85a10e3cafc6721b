"""Outputs of units that are kept while their part is fitted, where there is room for them.

The fit runs the same data through a part once per group of units. The outputs of a teacher's units
do not change meanwhile, nor do those of merged linears that are fitted already. If they are kept,
they are computed once.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dam.streams.storage import DiskTensor, Location, Storage, TensorFile

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
    _precisions: dict[str, torch.dtype] = field(default_factory=dict)
    _outputs: dict[tuple[int, int], dict[str, Tensor | DiskTensor]] = field(default_factory=dict)
    _files: dict[str, TensorFile] = field(default_factory=dict)

    def of(
        self, source: int, chunk: slice, device: torch.device, *, only: frozenset[str] | None = None
    ) -> Outputs:
        """The outputs that are kept for one chunk, on a device, in the dtypes that units put out.

        A unit that is replaced by its output must put out the dtype that it would have: what
        follows would be rounded in another way.

        Args:
            only: names of the units that are asked for; None asks for all.
        """
        kept = self._outputs.get((source, chunk.start), {})
        return {
            name: output[:].to(device, self._precisions[name])
            for name, output in kept.items()
            if only is None or name in only
        }

    def add(
        self,
        source: int,
        chunk: slice,
        outputs: Mapping[str, Tensor],
        precisions: Mapping[str, torch.dtype],
    ) -> None:
        """Keep the outputs of a chunk, if outputs are kept at all.

        Args:
            outputs: fp32, by the name of the unit.
            precisions: the dtypes in which they were computed, and are kept in memory.
        """
        if self.keep:
            own = self._outputs.setdefault((source, chunk.start), {})
            for name, output in outputs.items():
                own[name] = self._put(name, output, precisions[name])
                self._precisions[name] = precisions[name]

    def forget(self, names: Iterable[str]) -> None:
        """Give back the room of some units' outputs."""
        for name in names:
            for own in self._outputs.values():
                own.pop(name, None)
            self._files.pop(name, None)

    def _put(self, name: str, output: Tensor, precision: torch.dtype) -> Tensor | DiskTensor:
        if self.storage.outputs == "disk":
            if name not in self._files:
                self._files[name] = TensorFile(self.storage.folder)
            return self._files[name].append(output)
        kept = output.to(precision)
        return kept if self.storage.outputs == "device" else kept.cpu()


def outputs_sizes(
    outputs: Mapping[str, Tensor], precisions: Mapping[str, torch.dtype], place: Location
) -> dict[str, int]:
    """Bytes of some units' outputs in the place where they are kept, by the name of the unit."""
    return {
        name: output.numel() * kept_dtype(precisions[name], place).itemsize
        for name, output in outputs.items()
    }


def kept_dtype(precision: torch.dtype, place: Location) -> torch.dtype:
    """The dtype that an output of some precision is kept in: files are fp32."""
    return torch.float32 if place == "disk" else precision


def cache_bytes(sizes: Mapping[str, int], lasting: Container[str]) -> int:
    """Bytes to find room for, given those of the outputs of every unit of the teachers.

    The merged part's units put out as much, and take the place of the teachers' as these are
    fitted, but for those that stay.

    Args:
        lasting: units whose teachers' outputs are needed until the part is done.
    """
    return sum(size * (2 if name in lasting else 1) for name, size in sizes.items())
