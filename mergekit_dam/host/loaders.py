"""mergekit's loader for checkpoints whose weights may be quantised."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.host.compat import LazyTensorLoader, ShardedTensorIndex
from mergekit_dam.host.files import stored_index
from mergekit_dam.model import checkpoint
from mergekit_dam.sources.quantised.find import Quantisation, find_quantised

LOG = logging.getLogger(__name__)


class NoValues(LookupError):
    """Files have headers and no values."""


class PlainLoader(LazyTensorLoader):
    """A loader of plain weights: codes are dequantised as they are read, one tensor at a time.

    Its index has the weights alone, by their names, without the tensors beside the codes.

    Attributes:
        quantisation: the weights that are codes in the files.
        dtype: the dtype of weights that are dequantised.
        has_values: whether the files hold values, and not headers alone.
    """

    def __init__(
        self,
        stored: ShardedTensorIndex,
        quantisation: Quantisation,
        dtype: torch.dtype,
        *,
        lazy_unpickle: bool,
        has_values: bool = True,
    ) -> None:
        self.quantisation, self.dtype, self.has_values = quantisation, dtype, has_values
        paths = {n: f for n, f in stored.tensor_paths.items() if n not in quantisation.hidden}
        paths |= {n: stored.tensor_paths[w.stored] for n, w in quantisation.weights.items()}
        super().__init__(dataclasses.replace(stored, tensor_paths=paths), lazy_unpickle)
        self._stored = LazyTensorLoader(stored, lazy_unpickle)

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """The weight by its name, or by the first alias that is there; see mergekit's."""
        name = key
        if key not in self.index.tensor_paths:
            name = next((a for a in aliases or () if a in self.index.tensor_paths), key)

        quantised = self.quantisation.weights.get(name)
        if quantised is not None:
            return quantised.weight(lambda stored: self.stored(stored, device)).to(self.dtype)
        return self._stored.get_tensor(name, device=device, raise_on_missing=raise_on_missing)

    def stored(self, name: str, device: str = "cpu") -> Tensor:
        """A tensor of the files as it is stored.

        Raises:
            KeyError: there is none.
            NoValues: the files hold headers alone.
        """
        if not self.has_values:
            raise NoValues(name)
        found = self._stored.get_tensor(name, device=device)
        assert found is not None
        return found

    def required(self, name: str) -> Tensor:
        """The weight by its name, on the CPU; raises KeyError if there is none."""
        found = self.get_tensor(name)
        assert found is not None
        return found

    def flush(self) -> None:
        """Close the file that is open."""
        self._stored.flush()  # type: ignore[no-untyped-call]


def plain_loader(
    folder: Path,
    settings: Mapping[str, Any] | None,
    dtype: torch.dtype,
    *,
    lazy_unpickle: bool,
    has_values: bool = True,
) -> PlainLoader:
    """The loader of a model's files.

    Args:
        folder: the folder with the files.
        settings: `quantization_config` of the model's configuration, if it has one.
        dtype: the dtype of weights that are dequantised.
        lazy_unpickle: as in mergekit's options.
        has_values: whether the files hold values, and not headers alone.

    Raises:
        ArchitectureError: the files are missing or damaged, or of a format that cannot be read.
    """
    stored = stored_index(folder)
    quantisation = find_quantised(stored.tensor_paths, _dtypes(stored), settings)
    if has_values:
        _say_what(folder, quantisation, dtype, settings)
    return PlainLoader(
        stored, quantisation, dtype, lazy_unpickle=lazy_unpickle, has_values=has_values
    )


def _say_what(
    folder: Path, found: Quantisation, dtype: torch.dtype, settings: Mapping[str, Any] | None
) -> None:
    if found.weights:
        _say(
            f"{folder} is quantised ({found.name}); {len(found.weights)} weights are "
            f"dequantised to {str(dtype).removeprefix('torch.')} as they are read"
        )
    elif settings:
        _say(
            f"{folder}: the weights are plain, so `quantization_config` in its config.json is "
            f"left over and does not count"
        )


@lru_cache(maxsize=64)
def _say(message: str) -> None:
    """Warn once of what every loader of a model would say again."""
    LOG.warning(message)


def _dtypes(stored: ShardedTensorIndex) -> dict[str, str]:
    """The dtypes of all tensors by name, as safetensors calls them; empty if pickled."""
    found = {}
    for shard in stored.shards if stored.is_safetensors else ():
        file = Path(stored.base_path) / shard.filename
        with checkpoint.opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                found[name] = handle.get_slice(name).get_dtype()
    return found
