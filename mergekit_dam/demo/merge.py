"""The demo's merges, by mergekit's own command."""

import contextlib
import shlex
import sys
from pathlib import Path

import click

from mergekit_dam.host import plugin
from mergekit_dam.host.compat import LoaderCache


def merge(config: Path, out: Path) -> None:
    """Run `mergekit-yaml config out`; all its output goes to stderr.

    It runs in this process: a new one would take longer to start than to merge such small models.
    """
    plugin.install()
    from mergekit.scripts.run_yaml import main

    arguments = [config.as_posix(), out.as_posix()]
    click.echo("$ " + shlex.join(["mergekit-yaml", *arguments]), err=True)
    LoaderCache.loaders.clear()  # an earlier demo in this process may have used the same folder
    with contextlib.redirect_stdout(sys.stderr):
        main.main(arguments, prog_name="mergekit-yaml", standalone_mode=False)
