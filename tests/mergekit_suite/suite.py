"""mergekit's own tests with this package and without it, compared test by test.

    python -m tests.mergekit_suite.suite

1. Download the source distribution of the mergekit that is installed, by a pinned hash: it holds
   the tests, but not the module `tests.common` that they import; `common.py` here stands for it.
2. Run them twice. Python's `-S` leaves .pth files alone, so that nothing of this package is there.
3. Compare. A test that is there with this package alone (one per registered method) has to pass.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

HASHES = {"0.1.5": "caa51dbbfa493bcd62218d17f2bc7bb1c7a2a2e4baf4e2f34a29d73c66c594aa"}
"""sha256 of mergekit's source distributions on PyPI."""

_KNOWN = "from mergekit import merge_methods as m; m.get('dam')"


def main() -> int:
    """Run everything; 0 if mergekit's tests go alike with and without this package."""
    version = importlib.metadata.version("mergekit")
    if version not in HASHES:
        raise SystemExit(f"no hash of the source distribution of mergekit {version} in {__file__}")
    with tempfile.TemporaryDirectory() as name:
        folder = fetch(version, Path(name))
        if _succeeds(False, ["-c", _KNOWN], folder) or not _succeeds(True, ["-c", _KNOWN], folder):
            raise SystemExit("required `dam` in mergekit's registry with .pth files alone")
        without, within = (run(plugin, folder) for plugin in (False, True))
    print(f"mergekit {version}: {summary(without)} without mergekit-dam, {summary(within)} with it")
    for test, outcome in without.items():
        if outcome == "failed":
            print(f"  fails without it: {test}")
    found = differences(without, within)
    for line in found:
        print(f"  {line}")
    return int(bool(found) or not without)


def fetch(version: str, folder: Path) -> Path:
    """Download and unpack the source distribution, and complete its tests."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"mergekit=={version} --hash=sha256:{HASHES[version]}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", "mergekit", "--require-hashes", "--quiet"]
    pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    subprocess.run([*pip, "--requirement", str(wanted)], check=True)
    (archive,) = folder.glob("mergekit-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    unpacked = folder / f"mergekit-{version}"
    shutil.rmtree(unpacked / "mergekit")  # the one that is installed is under test
    (unpacked / "tests" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("common.py"), unpacked / "tests")
    return unpacked


def run(plugin: bool, folder: Path) -> dict[str, str]:
    """Run the tests with or without this package; the outcome of each by its name."""
    report = folder / f"{plugin}.xml"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", "tests"]
    _succeeds(plugin, ["-m", "pytest", *options], folder)
    return outcomes(report)


def _succeeds(plugin: bool, arguments: Sequence[str], folder: Path) -> bool:
    """Run Python in a folder, with .pth files or without."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not plugin:
        paths = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, *([] if plugin else ["-S"]), *arguments]
    quiet = subprocess.DEVNULL if arguments[0] == "-c" else None
    return subprocess.run(command, cwd=folder, env=variables, stderr=quiet).returncode == 0


def outcomes(report: Path) -> dict[str, str]:
    """Outcome of every test in a JUnit report: "passed", "skipped" or "failed"."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = (
            "skipped" if "skipped" in tags else outcome
        )
    return found


def differences(without: Mapping[str, str], within: Mapping[str, str]) -> list[str]:
    """Tests whose outcome differs with the package, one per line."""
    found = [
        f"{test}: {outcome} without it, {within.get(test, 'not run')} with it"
        for test, outcome in without.items()
        if within.get(test) != outcome
    ]
    more = within.keys() - without.keys()
    return found + [
        f"{test}: {within[test]}, and not run without it"
        for test in sorted(more)
        if within[test] == "failed"
    ]


def summary(found: Mapping[str, str]) -> str:
    """The number of tests per outcome."""
    kinds = ("passed", "skipped", "failed")
    return ", ".join(f"{sum(o == kind for o in found.values())} {kind}" for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
