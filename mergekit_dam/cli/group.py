"""The group of all commands, each of which is imported when it is asked for."""

import importlib
import os

import click

from mergekit_dam import __version__
from mergekit_dam.cli.notes import quiet_hub

COMMANDS = {
    "init": "mergekit_dam.cli.init:init",
    "plan": "mergekit_dam.cli.plan:plan",
    "merge": "mergekit_dam.cli.merge:merge",
    "evaluate": "mergekit_dam.cli.evaluate:evaluate",
    "report": "mergekit_dam.reports.commands:report",
    "inspect": "mergekit_dam.cli.inspect:inspect",
    "diff": "mergekit_dam.cli.diff:diff",
    "verify": "mergekit_dam.reproduce.commands:verify",
    "reproduce": "mergekit_dam.reproduce.commands:reproduce",
    "demo": "mergekit_dam.cli.demo:demo",
}
"""Name of every command -> its module and its name there, in the order of the help."""


class Commands(click.Group):
    """A group whose commands are imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of this name; None if there is none."""
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=Commands)
@click.version_option(__version__, prog_name="mergekit-dam")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Differentiable Adaptive Merging (arXiv 2410.08371) as a merge method of mergekit.

    With this package installed, mergekit's own command knows the method:

    \b
        mergekit-yaml dam.yaml ./out
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    quiet_hub()
