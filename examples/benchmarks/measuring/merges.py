"""A merge as a mergekit configuration, and the stock command that runs it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True, kw_only=True)
class Point:
    """One merge.

    Attributes:
        method: a method of mergekit, or one that the benchmark runs by a program of its own.
        parameters: parameters of the whole merge.
        weights: mergekit's `weight` of each model.
        base: which model is mergekit's `base_model`: the base, the first specialist, or none.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    base: Literal["base", "first", "none"] = "base"

    @property
    def fits(self) -> bool:
        """Whether the merge fits coefficients to text."""
        return self.method == "dam" and "coefficients" not in self.parameters

    @property
    def shown(self) -> dict[str, Any]:
        """The parameters as the table shows them."""
        if len(set(self.weights)) > 1:
            return {"weight": ":".join(f"{weight:g}" for weight in self.weights), **self.parameters}
        return {**({"weight": self.weights[0]} if self.weights else {}), **self.parameters}


def configuration(
    point: Point,
    models: Mapping[str, str],
    *,
    base: str | None,
    calibrations: Mapping[str, str],
    samples: int,
    sequence_length: int,
    dtype: str,
) -> str:
    """The mergekit configuration of a point, as YAML.

    Args:
        models, calibrations: by domain.
    """
    entries: list[dict[str, Any]] = []
    for index, (domain, model) in enumerate(models.items()):
        own: dict[str, Any] = {"weight": point.weights[index]} if point.weights else {}
        own |= {"calibration": calibrations[domain]} if point.fits else {}
        entries.append({"model": model, **({"parameters": own} if own else {})})
    bases = {"base": base, "first": next(iter(models.values())), "none": None}
    given = {"samples": samples, "sequence_length": sequence_length} if point.fits else {}
    config: dict[str, Any] = {
        "merge_method": point.method,
        "base_model": bases[point.base],
        "models": entries,
        "parameters": {**given, **point.parameters},
        "dtype": dtype,
    }
    text: str = yaml.safe_dump({k: v for k, v in config.items() if v}, sort_keys=False)
    return text


def merge_command(
    config: Path, out: Path, *, device: str, seed: int, options: Sequence[str] = ()
) -> list[str]:
    """The command `mergekit-yaml` of this environment on a configuration.

    Args:
        options: further options of that command.
    """
    program = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out)]
    on = [] if device == "cpu" else ["--device", device]
    return [*program, "--random-seed", str(seed), *on, *options]
