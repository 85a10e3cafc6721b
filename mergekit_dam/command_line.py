"""What the subcommands of `mergekit-dam` share: `--json`, `--debug`, devices, help, errors.

A command is declared with `cls=Command`, so that its help has an example and its exit codes:

    @click.command("plan", cls=Command, example="mergekit-dam plan dam.yaml ./out")
    @json_option
    def plan(as_json: bool) -> None: ...

Modules of commands import nothing slow: `mergekit-dam --help` imports all of them.
"""

import functools
import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import click

from mergekit_dam.errors import first_line

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = {0: "done", 1: "refused or failed; stderr says why", 2: "wrong command line"}
"""Exit codes of every command; some commands say more about theirs."""

_WIDEST = 120
"""Columns of output that does not go to a terminal."""


class Command(click.Command):
    """A subcommand whose help ends with an example and its exit codes, and that has `--debug`.

    Args:
        example: The example, of one line or more, each at most 56 characters wide.
        exit_codes: What exit codes mean, where this is more than `EXIT_CODES` says.
    """

    def __init__(
        self, *args: Any, example: str, exit_codes: Mapping[int, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.exit_codes = {**EXIT_CODES, **(exit_codes or {})}
        self.params.append(_debug_option())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example and the exit codes."""
        with formatter.section("Example"):
            for line in self.example.strip().splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), what) for code, what in self.exit_codes.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error is one line on stderr, and with `--debug` a traceback, too."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            if isinstance(error, (click.ClickException, BrokenPipeError)):
                raise
            if _interrupted(error):
                raise click.Abort from error
            raise click.ClickException(
                f"{type(error).__name__}: {first_line(error)}. This is not expected: --debug shows "
                f"where it came from; please report it"
            ) from error


_DEBUG = "mergekit_dam.debug"


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_DEBUG] = value

    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an error.",
    )


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error came out of ctrl-C: code of libraries may turn it into one of theirs."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def json_option(command: F) -> F:
    """Add `--json`, which means the same for every command: JSON on stdout, and nothing else."""
    decorate = click.option(
        "--json", "as_json", is_flag=True, help="Print JSON on stdout instead (> FILE keeps it)."
    )
    return decorate(command)


def device_options(default: str) -> Callable[[F], F]:
    """Add `--device`, and `--cuda`, which is short for `--device cuda`.

    The command gets `device`: "auto", "cpu", "cuda", ... `resolved_device` makes one of "auto".
    """

    def decorate(command: F) -> F:
        @click.option(
            "--device",
            default=default,
            show_default=True,
            metavar="DEVICE",
            help="cpu, cuda, cuda:1, ...; auto is a GPU if there is one.",
        )
        @click.option("--cuda", is_flag=True, help="Short for --device cuda.")
        @functools.wraps(command)
        def with_device(*args: Any, device: str, cuda: bool, **kwargs: Any) -> Any:
            if cuda and device not in (default, "cuda"):
                raise click.UsageError("--cuda is short for --device cuda: give one of them")
            return command(*args, device="cuda" if cuda else device, **kwargs)

        return cast(F, with_device)

    return decorate


def resolved_device(device: str) -> str:
    """The device that `--device` names; with `auto`, a GPU if torch finds one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout; numbers that JSON does not know raise ValueError."""
    click.echo(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def terminal_width() -> int:
    """Columns that output may take."""
    return shutil.get_terminal_size((_WIDEST, 24)).columns
