"""Hidden states and gradients between blocks, kept in files."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class BoundaryStates:
    """Tensors of every stage and stream, kept in files: more blocks need disk, not memory.

    Args:
        folder: Folder of the files; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a stage, one per stream."""
        named = {str(index): tensor.contiguous().cpu() for index, tensor in enumerate(tensors)}
        save_file(named, self._folder / f"{number:05d}.safetensors")

    def get(self, number: int) -> list[Tensor]:
        """The tensors kept for a stage, on the host."""
        named = load_file(self._folder / f"{number:05d}.safetensors")
        return [named[str(index)] for index in range(len(named))]

    @property
    def files(self) -> list[Path]:
        """The files of all stages."""
        return sorted(self._folder.glob("*.safetensors"))
