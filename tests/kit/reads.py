"""Reads of the models' tensors, noted while a merge runs."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch import Tensor


@dataclass
class Reads:
    """All reads of the models' tensors.

    Attributes:
        order: the folder of the model and the name of the tensor, for every read.
        live: bytes of the tensors that were read and are still alive.
        peak: the largest number of bytes that were alive at the same time.
    """

    order: list[tuple[str, str]] = field(default_factory=list)
    live: int = 0
    peak: int = 0

    def add(self, folder: str, name: str, tensor: Tensor) -> None:
        """Note a read, and wait for the end of its tensor."""
        size = tensor.untyped_storage().nbytes()
        self.order.append((folder, name))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


@contextlib.contextmanager
def watched_reads() -> Iterator[Reads]:
    """Note everything that mergekit's loaders read while the body runs."""
    reads = Reads()
    stock = LazyTensorLoader.get_tensor

    def get_tensor(loader: LazyTensorLoader, key: str, *args: Any, **kwargs: Any) -> Any:
        # A copy: a tensor of a memory-mapped file has no storage of its own.
        tensor = stock(loader, key, *args, **kwargs)
        if tensor is not None:
            tensor = tensor.clone()
            reads.add(loader.index.base_path, key, tensor)
        return tensor

    with mock.patch.object(LazyTensorLoader, "get_tensor", get_tensor):
        yield reads
