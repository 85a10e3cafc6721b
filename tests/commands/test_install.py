"""mergekit-dam as users install it: what each installer leaves, and what mergekit makes of it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.kit.environments import (
    CHECKOUT,
    INSTALL_KINDS,
    Environment,
    InstallKind,
    build_wheel,
    installed_environment,
)

pytestmark = pytest.mark.slow

STARTUP_FILES = {"mergekit_dam_autoload.pth", "mergekit_dam_autoload.start"}
GET_DAM = "from mergekit import merge_methods; print(merge_methods.get('dam').spec.name)"


@pytest.fixture(scope="module", params=INSTALL_KINDS)
def environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    return installed_environment(
        request.param, tmp_path_factory.mktemp("installed") / request.param
    )


def test_stock_mergekit_has_the_method(environment: Environment) -> None:
    result = environment.run(environment.python, "-W", "error::ImportWarning", "-c", GET_DAM)
    assert (result.stdout, result.stderr) == ("dam\n", "")


def test_stock_commands_run(environment: Environment) -> None:
    result = environment.run(environment.script("mergekit-yaml"), "--help")
    assert "Usage: mergekit-yaml" in result.stdout
    assert "mergekit-dam" not in result.stderr


def test_our_command_runs(environment: Environment) -> None:
    result = environment.run(environment.script("mergekit-dam"), "--help")
    assert "Usage: mergekit-dam" in result.stdout


def test_the_startup_files_are_at_the_root_of_site_packages(environment: Environment) -> None:
    assert set(environment.leftovers()) > STARTUP_FILES


@pytest.mark.parametrize("kind", INSTALL_KINDS)
def test_uninstalling_leaves_nothing(tmp_path: Path, kind: InstallKind) -> None:
    environment = installed_environment(kind, tmp_path / kind)
    environment.run(environment.python, "-c", GET_DAM)  # which writes the bytecode caches
    environment.uninstall()
    assert environment.leftovers() == []
    assert not environment.script("mergekit-dam").exists()
    code = "import sys, mergekit.merge; print([m for m in sys.modules if 'mergekit_dam' in m])"
    result = environment.run(environment.python, "-c", code)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def test_the_wheel_holds_the_startup_files_once_and_the_type_marker(tmp_path: Path) -> None:
    content = names(build_wheel(tmp_path / "wheel"))
    startup = [name for name in content if name.endswith((".pth", ".start"))]
    assert startup == sorted(STARTUP_FILES)
    assert "mergekit_dam/py.typed" in content
    assert any(name.endswith("licenses/LICENSE") for name in content)
    assert not [name for name in content if name.startswith(("tests", "examples"))]


def test_the_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    hatch = (sys.executable, "-m", "hatchling", "build", "--target", "sdist")
    subprocess.run([*hatch, "--directory", tmp_path], cwd=CHECKOUT, check=True, capture_output=True)
    sdist = next(tmp_path.glob("*.tar.gz"))
    from_sdist = build_wheel(tmp_path / "from_sdist", sdist)
    assert names(from_sdist) == names(build_wheel(tmp_path / "from_checkout"))
