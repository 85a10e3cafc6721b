"""Fresh environments that hold an installed mergekit-dam and everything else the tests run with.

A virtual environment is made and the distributions of the running one are linked into it, except
mergekit-dam: seconds in place of the gigabytes of installing torch anew.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

CHECKOUT = Path(__file__).parents[2]

InstallKind = Literal["wheel", "editable", "uv-wheel", "uv-editable"]
INSTALL_KINDS: tuple[InstallKind, ...] = get_args(InstallKind)


@dataclass(frozen=True)
class Environment:
    """A virtual environment at `root`, with mergekit-dam installed as `kind` says."""

    root: Path
    kind: InstallKind

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next((self.root / "lib").glob("python3.*")) / "site-packages"

    def script(self, name: str) -> Path:
        """A console script as this environment sees it, mergekit's `mergekit-yaml` for one."""
        return self.root / "bin" / name

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `command` outside the checkout, with no variable that could let it see the outside.

        Raises AssertionError with the command's output if it fails and `check` is set.
        """
        return _run(*command, cwd=self.root, check=check)

    def leftovers(self) -> list[str]:
        """The files and directories of site-packages that carry mergekit-dam's name."""
        return sorted(path.name for path in self.site_packages.iterdir() if _is_ours(path))

    def uninstall(self) -> None:
        """Uninstall mergekit-dam with the installer that installed it."""
        if self.kind.startswith("uv"):
            _run(*_uv("uninstall", self.python), "mergekit-dam", cwd=self.root)
        else:
            _run(self.python, "-m", "pip", "uninstall", "-y", "mergekit-dam", cwd=self.root)


def installed_environment(kind: InstallKind, root: Path) -> Environment:
    """Make a virtual environment at `root`, which must not exist, with mergekit-dam installed."""
    environment = Environment(root, kind)
    venv.create(root, symlinks=True, with_pip=find_spec("pip") is None)
    _link_distributions(environment)
    if kind.endswith("wheel"):
        what = [str(build_wheel(root / "wheel"))]
    else:
        what = ["--editable", str(CHECKOUT)]
    # Without dependencies, index and build isolation: everything is linked in, nothing is fetched.
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    if kind.startswith("uv"):
        _run(*_uv("install", environment.python), *options, *what, cwd=root)
    else:
        _run(environment.python, "-m", "pip", "install", *options, *what, cwd=root)
    return environment


def build_wheel(directory: Path, source: Path = CHECKOUT) -> Path:
    """Build the wheel of `source`, a checkout or an sdist, with the running environment's tools."""
    directory.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    _run(*pip, "--wheel-dir", directory, source, cwd=directory)
    return next(directory.glob("*.whl"))


def _link_distributions(environment: Environment) -> None:
    for directory in map(Path, site.getsitepackages()):
        for path in directory.iterdir() if directory.is_dir() else ():
            link = environment.site_packages / path.name
            if not _is_ours(path) and not link.exists() and path.name != "__pycache__":
                link.symlink_to(path)
    for script in Path(sysconfig.get_path("scripts")).glob("mergekit*"):
        if not _is_ours(script):
            _copy_script(script, environment)


def _copy_script(script: Path, environment: Environment) -> None:
    """Copy a console script as an installer writes it: with the environment's own interpreter."""
    _, *code = script.read_text().splitlines(keepends=True)
    copy = environment.script(script.name)
    copy.write_text("".join([f"#!{environment.python}\n", *code]))
    shutil.copymode(script, copy)


def _is_ours(path: Path) -> bool:
    return "mergekit_dam" in path.name or path.name == "mergekit-dam"


def _uv(action: Literal["install", "uninstall"], python: Path) -> tuple[str | Path, ...]:
    from uv import find_uv_bin

    return (find_uv_bin(), "pip", action, "--no-config", "--offline", "--python", python)


def _run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHON", "PIP_", "UV_", "VIRTUAL_ENV")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    variables |= {"UV_LINK_MODE": "copy", "UV_NO_CACHE": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True
    )
    if check and result.returncode:
        shown = " ".join(map(str, command))
        raise AssertionError(
            f"{shown}\nended with {result.returncode}:\n{result.stdout}{result.stderr}"
        )
    return result
