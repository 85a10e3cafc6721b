"""Sizes of a run, and sweeps over them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.benchmarks.measuring.models import Models
from mergekit_dam.errors import DamError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Random Llama models to be made.

    Attributes:
        layers: decoder layers.
        hidden, intermediate: features of the residual stream, and inside the MLP.
        vocab: rows of the embedding, and of the head, which are not tied.
        models: number of models, all near to one base.
        dtype: dtype in which they are stored.

    Raises:
        DamError: if no such model can be made.
    """

    layers: int = 12
    hidden: int = 576
    intermediate: int = 1536
    vocab: int = 8192
    models: int = 3
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        required = {"layers": 1, "hidden": 2, "intermediate": 1, "vocab": 512, "models": 1}
        for name, least in required.items():
            if getattr(self, name) < least:
                raise DamError(f"{name} {getattr(self, name)}: {least} is the least there can be")
        if self.hidden % 2:
            raise DamError(f"hidden {self.hidden}: rotary positions need an even number")


@dataclass(frozen=True)
class Inputs:
    """Models to merge, and their texts.

    Attributes:
        calibrations: values of the parameter `calibration`, by name of the model.
    """

    models: Models
    calibrations: Mapping[str, str]


Source = Inputs | Shape
"""Models that exist, or the shape of models to be made."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and places of a run.

    Attributes:
        out: folder of everything that is written, as an absolute path.
        samples: calibration sequences per model.
        sequence_length: tokens per sequence.
        rounds: how often `linear` and `replay` run.
        fit_rounds: how often rows that fit run, in the first rounds.
        dtype: dtype in which merges are computed and written.
        device: where merges are computed.
        out_shard_size: mergekit's option of that name; its own default if None.
        cold: drop models from the page cache before every merge.
        adapter_cache: folder of merged adapters; one in `out` if None.
    """

    out: Path
    samples: int = 16
    sequence_length: int = 256
    rounds: int = 3
    fit_rounds: int = 1
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    out_shard_size: str | None = None
    cold: bool = False
    adapter_cache: Path | None = None


Case = tuple[Mapping[str, int], Source, Settings]
"""The swept size with its value, the models to merge, and the settings with that value."""

OF_SHAPE = ("layers", "hidden", "intermediate", "vocab", "models")
OF_TEXT = ("samples", "sequence_length")


@dataclass(frozen=True)
class Sweep:
    """One size that takes several values; all others stay the same."""

    name: str
    values: tuple[int, ...]

    def over(self, source: Source, settings: Settings) -> Iterator[Case]:
        """The case of every value.

        Raises:
            DamError: if existing models would have to change their shape.
        """
        for value in self.values:
            case: dict[str, Any] = {self.name: value}
            if self.name in OF_TEXT:
                yield case, source, replace(settings, **case)
            elif isinstance(source, Shape):
                yield case, replace(source, **case), settings
            else:
                raise DamError(
                    f"--sweep {self.name}=...: models that are given have the shape that they "
                    f"have: pass --synthetic, or sweep {' or '.join(OF_TEXT)}"
                )


def parse_sweep(text: str) -> Sweep:
    """`name=value,value,...` as a sweep.

    Raises:
        DamError: if it is written otherwise, or the name is not one of `OF_SHAPE` and `OF_TEXT`.
    """
    name, _, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    values = [value.strip() for value in rest.split(",")]
    if name not in (*OF_SHAPE, *OF_TEXT) or not all(map(str.isdecimal, values)):
        names = ", ".join((*OF_SHAPE, *OF_TEXT))
        raise DamError(f"--sweep {text}: write NAME=VALUE,VALUE,... with one of {names}")
    return Sweep(name, tuple(dict.fromkeys(map(int, values))))


def every_case(source: Source, settings: Settings, sweeps: Sequence[Sweep]) -> list[Case]:
    """The cases to measure: one or, with sweeps, one for each value of each sweep.

    Raises:
        DamError: if a sweep asks for a value that is impossible.
    """
    if not sweeps:
        return [({}, source, settings)]
    return [case for sweep in sweeps for case in sweep.over(source, settings)]
