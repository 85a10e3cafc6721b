"""A device that is made up: its tensors say that they are on it, and compute on the CPU.

What a GPU would refuse it refuses, too: an operation on tensors of two devices. It counts where the
host would wait for a GPU, and the bytes that are allocated on it. Its tensors can also have shapes
and no numbers, so that the memory of a merge of any size can be counted.

    with MadeUpDevice() as device:
        torch.zeros(2, device="made_up")

torch offers the kind of device to the whole process once this module is imported: it belongs in a
process of its own.
"""

import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

NAME = "made_up"

CROSSING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operations that take tensors of two devices: copies, and indices that come from the host."""

WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
"""Operations whose result the host has to know before it goes on."""

HALF = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
"""Operations that run in half precision under autocast."""


class OnDevice(Tensor):
    """A tensor on the made-up device, with its numbers in a tensor of the CPU."""

    behind: Tensor
    count: int | None = None
    """How many of its conditions are true, where the host had told; for shapes alone."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.behind = inner
        return made

    def __getitem__(self, index: Any) -> Tensor:
        """Some of it; torch itself would make a tensor of a list, on a device that it lacks."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(map(_positions, parts)))

    def data_ptr(self) -> int:
        """Where its numbers are."""
        return self.behind.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """What holds its numbers."""
        return self.behind.untyped_storage()

    def tolist(self) -> Any:
        """The numbers; torch knows no lists of tensors of a class of their own."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func}: a tensor of the made-up device was used outside of it")


class MadeUpDevice(TorchDispatchMode):
    """The made-up device, as long as it is entered.

    Args:
        memory: Bytes that it has.
        numbers: Whether its tensors have numbers. If not, what is read from it is 1.

    Attributes:
        waits: where the host waited for the device -> how often.
        allocated, peak: bytes that are and were allocated on the device.
        at_peak: where the most bytes were allocated.
    """

    def __init__(self, memory: int = 2**40, *, numbers: bool = True) -> None:
        super().__init__()
        self.waits = Counter[str]()
        self.allocated = self.peak = 0
        self.at_peak = ""
        self.memory, self._inner = memory, torch.device("cpu" if numbers else "meta")
        self._storages = set[int]()
        self._generators = mock.patch("torch.Generator", _on_host(torch.Generator))

    def __enter__(self) -> "MadeUpDevice":
        _MODULE.entered = self
        self._generators.start()
        super().__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        self._generators.stop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten._fused_sdp_choice.default:
            return 0  # plain operations
        kwargs = dict(kwargs or {})
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        there = {id(t.behind): t for t in given if isinstance(t, OnDevice)}
        goes_to = kwargs.get("device")
        arrives = bool(there) if goes_to is None else torch.device(goes_to).type == NAME
        if not (there or arrives):
            return func(*args, **kwargs)
        if there and func not in CROSSING:
            _require_one_device(func, given)
        if _waits(func, args, arrives):
            self.waits[_place()] += 1
        result = self._run(func, args, kwargs, arrives)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the tensor itself learns of its new shape, too
                func(*args, **kwargs)
        if not arrives:
            return result
        made = tree_map(lambda t: self._on_device(t, there) if isinstance(t, Tensor) else t, result)
        if not there and func is aten._to_copy.default and args[0].dtype == torch.bool:
            made.count = int(args[0].sum())
        return made

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], arrives: bool) -> Any:
        """The operation on the tensors that have the numbers, or the shapes."""
        if "device" in kwargs:
            kwargs["device"] = self._inner if arrives else torch.device("cpu")
        if self._inner.type == "cpu":
            args, kwargs = tree_map(_inner, (args, kwargs))
            return func(*args, **kwargs)
        return _shaped(func, args, kwargs, arrives)

    def _on_device(self, inner: Tensor, there: Mapping[int, OnDevice]) -> Tensor:
        if id(inner) in there:  # an operation in place
            return there[id(inner)]
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.allocated += size
            if self.allocated > self.peak:
                self.peak, self.at_peak = self.allocated, _place()
            weakref.finalize(storage, self._freed, key, size)
        return OnDevice(inner)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.allocated -= size


_NUMBERS = (1 - number * 1e-7 for number in itertools.count())
"""What is read from a device of shapes alone: every loss is lower than the one before."""


def _positions(index: Any) -> Any:
    return torch.tensor(index) if isinstance(index, list) else index


def _inner(value: Any) -> Any:
    return value.behind if isinstance(value, OnDevice) else value


def _shaped(func: Any, args: Any, kwargs: Any, arrives: bool) -> Any:
    """An operation on shapes alone. Every number of the device is 1; no search finds any."""
    if func is aten._local_scalar_dense.default:
        return next(_NUMBERS) if args[0].is_floating_point() else 1
    if func is aten.equal.default:
        return args[0].shape == args[1].shape
    if func is aten.nonzero.default:
        return torch.empty(0, args[0].ndim, dtype=torch.int64, device="meta")
    if not arrives:  # to the host
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if func is aten.copy_.default and not isinstance(args[0], OnDevice):
        return args[0].fill_(1)
    if func is aten.index.Tensor:
        args = (args[0], [_chosen(own) for own in args[1]], *args[2:])
    args, kwargs = tree_map(_meta, (args, kwargs))
    return func(*args, **kwargs)


def _meta(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.behind
    return value.to("meta") if isinstance(value, Tensor) and value.ndim else value


def _chosen(index: Any) -> Any:
    """Positions in place of a condition: those of the host's where it came from there, else all."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return index
    count = index.count if isinstance(index, OnDevice) else int(index.sum())
    count = len(index) if count is None else count
    return torch.empty(count, dtype=torch.int64, device="meta")


def _require_one_device(func: Any, given: Sequence[Tensor]) -> None:
    """Raise as a GPU does; a number that the host has goes along with any tensor."""
    for tensor in given:
        if not isinstance(tensor, OnDevice) and tensor.ndim:
            raise RuntimeError(
                f"{func}: expected all tensors to be on {DEVICE}, but got one of shape "
                f"{list(tensor.shape)} on {tensor.device}"
            )


def _waits(func: Any, args: Any, arrives: bool) -> bool:
    """Whether the host would wait for what the operation puts out."""
    if func is aten.copy_.default:
        return not isinstance(args[0], OnDevice)
    if func is aten._to_copy.default:
        return not arrives
    if func in CROSSING:
        return any(i is not None and (i.dtype == torch.bool or i.device != DEVICE) for i in args[1])
    return func in WAITING


def _place() -> str:
    """The line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if "/mergekit_dam/" in file:
            return f"{file.rpartition('/mergekit_dam/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _on_host(generator: type[torch.Generator]) -> Any:
    """Generators of the device, which are the host's."""
    return lambda device="cpu": generator("cpu")


def _in_half(func: Any) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def half(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.dtype == torch.float32
            return value.to(dtype) if is_float else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return func(*tree_map(half, args), **tree_map(half, kwargs))

    return run


class _Module:
    """What torch has for a kind of device, such as `torch.cuda`."""

    entered: MadeUpDevice

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def set_per_process_memory_fraction(fraction: float, device: Any) -> None:
        assert fraction == 1

    @staticmethod
    def get_per_process_memory_fraction(device: Any) -> float:
        return 1.0

    def get_device_properties(self, device: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=self.entered.memory)

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.entered.memory - self.entered.allocated, self.entered.memory

    def memory_allocated(self, device: Any) -> int:
        return self.entered.allocated

    memory_reserved = memory_allocated


_MODULE = _Module()
_setup_privateuseone_for_python_backend(NAME, backend_module=_MODULE)
DEVICE = torch.device(NAME, 0)
_OTHERS = library.Library("_", "IMPL")
_OTHERS.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
_HALVED = library.Library("aten", "IMPL")
for _name in HALF:
    _HALVED.impl(_name, _in_half(getattr(aten, _name).default), "AutocastPrivateUse1")
