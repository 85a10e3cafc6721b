"""Pieces of command lines: named paths, and further rows of `dam`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import yaml

from mergekit_dam.errors import DamError


def named_paths(pairs: Iterable[str], option: str) -> dict[str, str]:
    """`NAME=PATH`, each name once.

    Raises:
        click.UsageError: if one is written otherwise, or a name comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path) or name in found:
            raise click.UsageError(f"{option} {pair}: write NAME=PATH, each name once")
        found[name] = path
    return found


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """`name: key=value, key=value` as a name and parameters; numbers, true and false are read.

    Raises:
        DamError: if it is written otherwise.
    """
    name, colon, rest = (piece.strip() for piece in text.partition(":"))
    assignments = [piece.partition("=") for piece in rest.split(",")] if rest else []
    if not name or not colon or not all(key.strip() and equals for key, equals, _ in assignments):
        raise DamError(f"{text!r} is not understood: write 'name: key=value, key=value'")
    return name, {key.strip(): _scalar(value.strip()) for key, _, value in assignments}


def output_folder(path: Path) -> Path:
    """The folder as an absolute path that mergekit takes for nothing but a path.

    Raises:
        DamError: if it would.
    """
    absolute = path.absolute()
    if set("+@") & set(str(absolute)):
        raise DamError(f"{absolute} has a + or @, which mergekit reads as more than a path")
    return absolute


def _scalar(value: str) -> Any:
    """As YAML reads it, and 1e-3 is a number too."""
    read = yaml.safe_load(value)
    try:
        return float(read) if isinstance(read, str) else read
    except ValueError:
        return read
