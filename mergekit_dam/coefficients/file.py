"""The file of a merge's coefficients, from which the merge can be replayed."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.coefficients.rows import Identity, match_rows
from mergekit_dam.coefficients.saved import (
    WrongFileError,
    check_headers,
    check_values,
    provenance_of,
)
from mergekit_dam.digests import sha256_from
from mergekit_dam.errors import ConfigError, first_line, listed
from mergekit_dam.stored import read_header, written_whole

LOG = logging.getLogger(__name__)

FILE_NAME = "dam_coefficients.safetensors"
CORRECTIONS_NAME = "dam_corrections.safetensors"
REPORT_NAME = "dam_report.json"
METADATA_KEY = "mergekit_dam"

Changed = Literal["error", "allow"]
"""What becomes of models whose weights are not those of the merge."""


@dataclass(frozen=True)
class CoefficientFile:
    """A saved set of coefficients.

    Attributes:
        coefficients: Output tensor's name -> fp32 `[sources, n]`.
        sources: Models in the order of the rows, as written in the configuration.
        metadata: Provenance: versions, revisions, digests of the models' files (`identities`),
            parameters, digests of the calibration.
        parameter: Parameter of the configuration that names the file; messages begin with it.
        corrections: File of the corrections that belong to the coefficients, if there are any.
    """

    coefficients: Mapping[str, Tensor]
    sources: tuple[str, ...]
    metadata: Mapping[str, Any]
    parameter: str = "coefficients"
    corrections: Path | None = None

    @property
    def identities(self) -> tuple[Identity, ...]:
        """The models of the rows, with digests of their weights where the file has them."""
        known = self.metadata.get("identities", {})
        return tuple(Identity(source, known.get(source, {})) for source in self.sources)

    def rows_of(self, models: Sequence[Identity], *, changed: Changed = "error") -> list[int]:
        """The rows of the coefficients of some models, in the order of these models.

        Args:
            models: As many models as the file has.
            changed: What becomes of models with other weights, or under names that are unknown:
                an error, or a warning.

        Raises:
            ConfigError: If the file was made from another number of models, or from others.
        """
        if len(models) != len(self.sources):
            got = [model.name for model in models]
            raise ConfigError(
                f"{self.parameter}: made from {len(self.sources)} models "
                f"({listed(self.sources, 5)}), got {len(models)} ({listed(got, 5)}); "
                f"required as many, a base included where that merge had one"
            )
        found = match_rows(self.identities, models)
        if found.changed and changed == "error":
            remedy = (
                "name the models of that merge, or set `changed_models: allow` to merge others "
                "with its coefficients"
            )
            raise ConfigError(
                *(f"{self.parameter}: {problem}; {remedy}" for problem in found.changed)
            )
        for sentence in found.changed:
            LOG.warning("%s: %s", self.parameter, sentence)
        return list(found.rows)

    def save(self, path: Path) -> None:
        """Write the file atomically: a reader sees the whole file or none."""
        # One key for all: safetensors writes several keys in an order that differs between runs.
        provenance = json.dumps({**self.metadata, "sources": self.sources}, sort_keys=True)
        # Tied tensors share their coefficients, which safetensors refuses to write.
        tensors = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.coefficients.items()
        }
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: provenance})

    @classmethod
    def load(cls, path: str | Path, *, parameter: str = "coefficients") -> "CoefficientFile":
        """Read a file of coefficients.

        Args:
            path: The file, or a folder with a file of the usual name.
            parameter: Parameter of the configuration that names the file.

        Raises:
            ConfigError: If there is no such file, it is damaged, or this package did not write it.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"{parameter}: no file at {file}; give the path of a {FILE_NAME} "
                f"that an earlier dam merge wrote, or of its folder"
            )
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = provenance_of((handle.metadata() or {}).get(METADATA_KEY))
                sources = tuple(metadata.pop("sources"))
                names = list(handle.keys())
                slices = ((name, handle.get_slice(name)) for name in names)
                headers = {name: (own.get_shape(), own.get_dtype()) for name, own in slices}
                check_headers(headers, len(sources))
                tensors = {name: handle.get_tensor(name) for name in names}
                check_values(tensors)
        except (SafetensorError, OSError, WrongFileError) as error:
            raise ConfigError(
                f"{parameter}: {file} was not written by a dam merge, or was changed: "
                f"{first_line(error)}; name the {FILE_NAME} of an intact merge"
            ) from error
        corrections = _corrections(file, metadata.get("corrections"), parameter)
        return cls(tensors, sources, metadata, parameter, corrections)


def _corrections(file: Path, digest: Any, parameter: str) -> Path | None:
    """The file of the corrections that belong to a file of coefficients, by their digest."""
    if digest is None:
        return None
    found = file.parent / CORRECTIONS_NAME
    required = (
        f"{parameter}: {file} belongs to a merge with corrections; required its "
        f"{CORRECTIONS_NAME} in the same folder"
    )
    if not found.is_file():
        raise ConfigError(f"{required}, where there is none")
    try:
        with safe_open(found, framework="pt") as handle:
            own = (handle.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise ConfigError(f"{required}, got a damaged file ({error!r})") from error
    if own != digest:
        raise ConfigError(f"{required}, got the one of another merge")
    if sha256_from(found, read_header(found)[0]) != digest:
        raise ConfigError(f"{required}, got one whose values were changed or are damaged")
    return found
