"""Command lines: the options that the benchmarks share, and how their values are read."""

import functools
import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import yaml

from mergekit_dam.errors import DamError

Command = Callable[..., None]
Option = Callable[[Command], Command]
"""A decorator that adds an option to a command."""


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Values of the options that the benchmarks share, by the names of the options."""

    base: str | None
    model: tuple[str, ...]
    calibration: tuple[str, ...]
    samples: int
    sequence_length: int
    dam: tuple[str, ...]
    only: tuple[str, ...]
    skip: tuple[str, ...]
    dtype: str
    device: str
    seed: int
    lora_merge_cache: Path | None
    out: Path

    def settings(self) -> dict[str, Any]:
        """The fields that the settings of all benchmarks have.

        Raises:
            DamError: if the output folder has a name that mergekit would misread.
        """
        return {
            "out": output_folder(self.out),
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "dtype": self.dtype,
            "device": self.device,
            "seed": self.seed,
            "adapter_cache": self.lora_merge_cache,
        }

    def choices(self) -> dict[str, Any]:
        """The fields that choose the rows of the table.

        Raises:
            DamError: if a row of `dam` is not written as `parse_variant` reads it.
        """
        return {
            "variants": dict(map(parse_variant, self.dam)),
            "only": self.only,
            "skip": self.skip,
        }


def _size(name: str, default: int, *, least: int, help: str) -> Option:
    """An option that takes a whole number, `least` or more."""
    return click.option(
        name, type=click.IntRange(min=least), default=default, show_default=True, help=help
    )


_MODELS = (
    click.option("--base", metavar="MODEL", help="Model that all of them were tuned from."),
    click.option("--model", metavar="NAME=PATH", multiple=True, help="A model to merge."),
    click.option(
        "--calibration", metavar="NAME=PATH", multiple=True, help="Text to fit that model on."
    ),
    _size("--samples", 16, least=1, help="Calibration sequences per model."),
    _size("--sequence-length", 256, least=2, help="Tokens per sequence."),
)
_ROWS = (
    click.option(
        "--dam",
        metavar="'NAME: KEY=VALUE, ...'",
        multiple=True,
        help="Add a row: dam with these parameters.",
    ),
    click.option(
        "--only", metavar="ROW", multiple=True, help="Run only these rows; * is a wildcard."
    ),
    click.option(
        "--skip", metavar="ROW", multiple=True, help="Leave out these rows; * is a wildcard."
    ),
)
_MACHINE = (
    click.option("--device", default="cpu", show_default=True, help="For example cuda or cuda:1."),
    _size("--seed", 0, least=0, help="Seed of all random choices."),
    click.option(
        "--lora-merge-cache",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of merged adapters, as mergekit's.  [default: OUT/adapters]",
    ),
)


def common_options(*, dtype: str, out: str) -> Option:
    """A decorator that adds the shared options; the command gets them as its argument `common`.

    Args:
        dtype, out: default values of these options.
    """
    dtype_option = click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default=dtype,
        show_default=True,
        help="Dtype in which merges are computed and written.",
    )
    out_option = click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path(out),
        show_default=True,
        help="Folder for the results and for all intermediate files.",
    )

    def add(command: Command) -> Command:
        def with_common(**values: Any) -> None:
            shared = {field.name: values.pop(field.name) for field in fields(CommonOptions)}
            command(common=CommonOptions(**shared), **values)

        added: Command = functools.wraps(command)(with_common)
        for option in reversed((*_MODELS, *_ROWS, dtype_option, *_MACHINE, out_option)):
            added = option(added)
        return added

    return add


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


def named_texts(pairs: Iterable[str], option: str, models: Collection[str]) -> dict[str, str]:
    """`NAME=PATH`, where each name is that of a model.

    Raises:
        click.UsageError: as `named_paths` does, and if no model has that name.
    """
    texts = named_paths(pairs, option)
    for name in texts:
        if name not in models:
            raise click.UsageError(f"{option} {name}=...: no --model has that name")
    return texts


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
    """The folder as an absolute path that mergekit reads as a path and as nothing else.

    Raises:
        DamError: if mergekit would read more into it.
    """
    absolute = path.absolute()
    if set("+@") & set(str(absolute)):
        raise DamError(f"{absolute} has a + or @, which mergekit reads as more than a path")
    return absolute


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Ends the process with status 130 on Ctrl-C or SIGTERM; a merge that runs is ended too.

    Args:
        out: folder of the results, to be named in the message.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Stopped; the results so far are in {out}", err=True)
        raise SystemExit(130) from None


def _scalar(value: str) -> Any:
    """The value as YAML reads it; unlike in YAML, 1e-3 is a number too."""
    read = yaml.safe_load(value)
    try:
        return float(read) if isinstance(read, str) else read
    except ValueError:
        return read
