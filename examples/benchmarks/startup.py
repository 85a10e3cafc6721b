"""Milliseconds that the plugin adds to the start of a Python process that does nothing.

Every process of the environment reads the .pth file, so all of them pay for it. Two virtual
environments are made that differ in one thing: one holds mergekit-dam as a wheel installs it. Both
link to the packages of the running environment, since a directory of that size has to be read.

    python -m examples.benchmarks.startup --pairs 200
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import mergekit_dam

PACKAGE = Path(mergekit_dam.__file__).parent
STARTUP_FILES = ("mergekit_dam_autoload.pth", "mergekit_dam_autoload.start")


def make_environment(root: Path, *, with_plugin: bool) -> Path:
    """Make a virtual environment at `root`; returns its interpreter."""
    venv.create(root, symlinks=True, with_pip=False)
    site_packages = next((root / "lib").glob("python3.*")) / "site-packages"
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "mergekit_dam" not in path.name:
            (site_packages / path.name).symlink_to(path)
    if with_plugin:
        shutil.copytree(PACKAGE, site_packages / PACKAGE.name)
        for name in STARTUP_FILES:
            # A checkout holds them in the package; a wheel installs them beside it.
            file = PACKAGE / name if (PACKAGE / name).exists() else PACKAGE.parent / name
            shutil.copy(file, site_packages)
    return root / "bin" / "python"


def start(python: Path) -> float:
    """Milliseconds from launching `python -c pass` to its end."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    began = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=variables, check=True)
    return (time.perf_counter() - began) * 1000


def measure(without: Path, with_plugin: Path, pairs: int) -> list[tuple[float, float]]:
    """Times of (without, with) the plugin, run in turns, so that a busy machine slows both."""
    times = []
    for pair in range(pairs):
        if pair % 2:  # whichever runs second may find warmer caches
            plugged = start(with_plugin)
            times.append((start(without), plugged))
        else:
            times.append((start(without), start(with_plugin)))
    return times


def main() -> None:
    """Print how long Python takes to start with the package and without it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="runs of each kind (default 40)")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as directory:
        without = make_environment(Path(directory, "without"), with_plugin=False)
        with_plugin = make_environment(Path(directory, "with"), with_plugin=True)
        measure(without, with_plugin, 3)  # writes the bytecode caches
        times = measure(without, with_plugin, pairs)
    differences = [plugged - bare for bare, plugged in times]
    low, _, high = statistics.quantiles(differences, n=4)
    print(f"Python {sys.version.split()[0]}, {pairs} pairs of `python -c pass`, medians:")
    print(f"  without mergekit-dam  {statistics.median(bare for bare, _ in times):7.2f} ms")
    print(f"  with mergekit-dam     {statistics.median(plugged for _, plugged in times):7.2f} ms")
    added = statistics.median(differences)
    print(f"  added, of the pairs   {added:7.2f} ms  (middle half {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
