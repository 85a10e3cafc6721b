"""`Coefficients`."""

import dataclasses
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME, CoefficientFile
from mergekit_dam.coefficients.saved import WrongFileError, check_values
from mergekit_dam.errors import DamError, listed

EDITED = "edited"
"""Entry of the provenance: tensors whose coefficients are not those of the fit."""


class Coefficients:
    """The learned coefficients of a merge, one per model and input column of every tensor.

    A merged weight is `W = sum_s c_s * W_s` (and its correction, if it has one), with `c_s` a
    number for each input column, or one for the whole tensor. Models are in the order of the rows.

    >>> import mergekit_dam
    >>> found = mergekit_dam.Coefficients.load("merged")
    >>> found.models
    ('models/math', 'models/animals')
    >>> name = "model.layers.0.mlp.down_proj.weight"
    >>> found[name].shape[0] == len(found.models)
    True
    >>> columns = found.of("models/math", name)
    >>> halves = found.with_tensor(name, [[0.5], [0.5]])
    >>> path = halves.save("changed")      # `coefficients: changed` in a configuration replays it
    >>> mergekit_dam.Coefficients.load(path).of("models/math", name).tolist()
    [0.5]
    """

    def __init__(self, file: CoefficientFile) -> None:
        self._file = file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Coefficients":
        """Read the coefficients of a merge.

        Args:
            path: The folder of a merged model, or a `dam_coefficients.safetensors`.

        Raises:
            DamError: There is no such file, or it is damaged.
        """
        return cls(CoefficientFile.load(Path(path), parameter=str(path)))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, and of the base, in the order of the rows."""
        return self._file.sources

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the merged tensors, sorted."""
        return tuple(sorted(self._file.coefficients))

    def __getitem__(self, tensor: str) -> Tensor:
        """The coefficients of a tensor, fp32 `[models, columns]` or `[models, 1]`; a copy."""
        return self._rows(tensor).clone()

    def of(self, model: str, tensor: str) -> Tensor:
        """The coefficients of one model in a tensor, fp32 `[columns]` or `[1]`; a copy.

        Raises:
            DamError: The merge had no such model or tensor.
        """
        if model not in self.models:
            raise DamError(f"model: required one of {listed(self.models, 8)}, got {model!r}")
        return self._rows(tensor)[self.models.index(model)].clone()

    def with_tensor(self, tensor: str, rows: Tensor | list[list[float]]) -> "Coefficients":
        """The same with other coefficients of a tensor; the provenance says so.

        Args:
            rows: `[models, columns]` as in the merge, or `[models, 1]`.

        Raises:
            DamError: The merge had no such tensor, or the shape or a value does not fit.
        """
        count, columns = self._rows(tensor).shape
        try:
            made = torch.as_tensor(rows).detach().to("cpu", torch.float32)
        except (TypeError, ValueError) as error:
            raise DamError(f"{tensor}: required numbers [{count}, {columns}]: {error}") from error
        if tuple(made.shape) not in {(count, columns), (count, 1)}:
            raise DamError(
                f"{tensor}: required coefficients of shape [{count}, {columns}] or [{count}, 1], "
                f"got {list(made.shape)}"
            )
        try:
            check_values({tensor: made})
        except WrongFileError as error:
            raise DamError(f"{error}; required finite numbers") from error
        edited = sorted({*self._file.metadata.get(EDITED, ()), tensor})
        return Coefficients(
            dataclasses.replace(
                self._file,
                coefficients={**self._file.coefficients, tensor: made.clone()},
                metadata={**self._file.metadata, EDITED: edited},
            )
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the coefficients, and the corrections that belong to them, for a replay.

        Args:
            folder: Made if it is not there.

        Returns:
            The file of the coefficients.

        Raises:
            DamError: The folder cannot be written.
        """
        place = Path(folder)
        corrections = self._file.corrections
        try:
            place.mkdir(parents=True, exist_ok=True)
            if corrections is not None and corrections.parent.resolve() != place.resolve():
                shutil.copyfile(corrections, place / CORRECTIONS_NAME)
            self._file.save(place / FILE_NAME)
        except OSError as error:
            raise DamError(f"{place}: cannot be written ({error.strerror or error})") from error
        return place / FILE_NAME

    def __repr__(self) -> str:
        return f"Coefficients({len(self.tensors)} tensors of {', '.join(self.models)})"

    def _rows(self, tensor: str) -> Tensor:
        if tensor not in self._file.coefficients:
            raise DamError(
                f"tensor: the merge has none of this name: {tensor!r}; it has "
                f"{listed(self.tensors, 3)}"
            )
        return self._file.coefficients[tensor]
