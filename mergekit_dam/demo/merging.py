"""Run mergekit's own command on a configuration, as a user would."""

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import click

from mergekit_dam.errors import DamError


def merge(config: Path, out: Path) -> None:
    """Merge with `mergekit-yaml`, in a process of its own; all its output goes to stderr.

    Raises:
        DamError: if the command fails; what it said stands above.
    """
    arguments = [config.as_posix(), out.as_posix()]
    click.echo("$ " + shlex.join(["mergekit-yaml", *arguments]), err=True)
    done = subprocess.run([*_command(), *arguments], stdout=2, check=False)  # 2: stderr
    if done.returncode:
        raise DamError(f"mergekit-yaml {config} failed with status {done.returncode}")


def _command() -> list[str]:
    """`mergekit-yaml` of the environment that runs us, whatever PATH says."""
    script = Path(sysconfig.get_path("scripts"), "mergekit-yaml")
    for path in (script, script.with_suffix(".exe")):
        if path.is_file():
            return [str(path)]
    return [sys.executable, "-m", "mergekit.scripts.run_yaml"]
