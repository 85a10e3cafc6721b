"""The YAML files of the demo's merges, and the call of `mergekit-yaml`."""

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import click
import yaml

from mergekit_dam.demo.settings import DemoSettings
from mergekit_dam.demo.texts import DOMAINS
from mergekit_dam.errors import DamError

METHODS = ("linear", "task_arithmetic", "ties", "dam")

_HEAD = "# Paths start at the folder that `mergekit-dam demo` was run in.\n"
# The best of a sweep over weights and densities, chosen on the test text itself. This favours
# these methods over `dam`, which never sees that text.
_STOCK_PARAMETERS: dict[str, dict[str, object]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.5, "density": 0.5, "normalize": False},
}


def recipe(method: str, directory: Path, settings: DemoSettings) -> str:
    """The configuration of one merge as text; `directory` is the demo's folder."""
    models = [{"model": _named(directory / domain)} for domain in DOMAINS]
    config: dict[str, object] = {"merge_method": method}
    if method != "linear":
        config["base_model"] = _named(directory / "base")
    if method == "dam":
        config["models"] = [
            {
                **model,
                "parameters": {"calibration": _named(text_path(directory, domain, "calibration"))},
            }
            for model, domain in zip(models, DOMAINS, strict=True)
        ]
        config["parameters"] = {
            "samples": settings.calibration_samples,
            "sequence_length": settings.sequence_length,
        }
    else:
        config["models"] = models
        config["parameters"] = _STOCK_PARAMETERS[method]
    config["dtype"] = "float32"
    return _HEAD + yaml.safe_dump(config, sort_keys=False)


def text_path(directory: Path, domain: str, part: str) -> Path:
    """Path of the text of a domain; `part` is "calibration" or "test"."""
    return directory / "data" / f"{domain}.{part}.jsonl"


def _named(path: Path) -> str:
    """A path for the YAML; mergekit may look up `a/b` on the Hub, but never `./a/b`."""
    return path.as_posix() if path.is_absolute() else f"./{path.as_posix()}"


def merge(config: Path, out: Path) -> None:
    """Merge with `mergekit-yaml` in a separate process; all its output goes to stderr.

    Raises:
        DamError: If the command fails; its own output is printed before.
    """
    arguments = [config.as_posix(), out.as_posix()]
    click.echo("$ " + shlex.join(["mergekit-yaml", *arguments]), err=True)
    done = subprocess.run([*_command(), *arguments], stdout=2, check=False)  # 2: stderr
    if done.returncode:
        raise DamError(f"mergekit-yaml {config} failed with status {done.returncode}")


def _command() -> list[str]:
    """The command `mergekit-yaml` of this Python environment, whatever PATH is."""
    script = Path(sysconfig.get_path("scripts"), "mergekit-yaml")
    for path in (script, script.with_suffix(".exe")):
        if path.is_file():
            return [str(path)]
    return [sys.executable, "-m", "mergekit.scripts.run_yaml"]
