"""Calibrations that are written as an entry of axolotl -> the texts that mean the same.

mergekit's configuration has no type for such entries, so they are replaced before it is made.
"""

from collections.abc import Mapping
from typing import Any

from mergekit_dam.calibration.entries import as_value
from mergekit_dam.errors import CalibrationError, ConfigError


def without_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed YAML in which every `calibration` is a text or a list of texts.

    Raises:
        ConfigError: With every entry that cannot be read.
    """
    problems: list[str] = []
    replaced = {key: _replaced(value, key, problems) for key, value in values.items()}
    if problems:
        raise ConfigError(*problems)
    return replaced


def _replaced(value: Any, place: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        return [_replaced(own, f"{place}[{i}]", problems) for i, own in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _calibration(own, f"{place}.{key}", problems)
        if key == "calibration"
        else _replaced(own, f"{place}.{key}", problems)
        for key, own in value.items()
    }


def _calibration(value: Any, place: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        return [_calibration(own, f"{place}[{i}]", problems) for i, own in enumerate(value)]
    if not isinstance(value, Mapping) or "value" in value:  # a filter, which is refused later
        return value
    try:
        return as_value(value)
    except CalibrationError as error:
        problems.append(f"{place}: {error.message}")
        return ""
