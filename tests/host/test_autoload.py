"""The import hook, in processes of its own: a fake mergekit, a fake plugin, the real autoload.py.

`-S` keeps this environment's .pth files, an installed mergekit-dam's among them, out of the way.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mergekit_dam"
INSTALL = "from mergekit_dam.autoload import install; install()\n"

NOTING_PLUGIN = """
def on_import(module):
    print("plugin got", module.__name__, module.LAST_LINE)
"""

FAILING_PLUGINS = {
    "raises on import": "raise RuntimeError('no such mergekit')",
    "raises when called": "def on_import(module): raise RuntimeError('no such mergekit')",
    "does not parse": "def on_import(",
    "is not there": None,
}


class Tree:
    """A directory with a fake mergekit and a mergekit_dam of which only the import hook is real."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("mergekit/__init__.py", "")
        self.write("mergekit/merge_methods/__init__.py", "LAST_LINE = 'executed'\n")
        self.write("mergekit/plan.py", "import mergekit.merge_methods\nLAST_LINE = 'executed'\n")
        self.write("mergekit/merge.py", "import mergekit.plan\nLAST_LINE = 'executed'\n")
        self.write("mergekit/options.py", "")
        self.write("mergekit_dam/__init__.py", "")
        self.write("mergekit_dam/host/__init__.py", "")
        self.write("mergekit_dam/host/plugin.py", NOTING_PLUGIN)
        shutil.copy(PACKAGE / "autoload.py", root / "mergekit_dam")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(self, code: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `code` with this tree on the path; the process must end well."""
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
        }
        result = subprocess.run(
            [sys.executable, "-S", *options, "-c", code],
            env=environment | {"PYTHONPATH": str(self.root)},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result

    def lines(self, code: str, *options: str) -> list[str]:
        """The output of `code`, which must write nothing to stderr."""
        result = self.run(code, *options)
        assert result.stderr == ""
        return result.stdout.splitlines()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_the_plugin_gets_each_watched_module_once_it_is_executed(tree: Tree) -> None:
    assert tree.lines(INSTALL + "import mergekit.merge, mergekit.options") == [
        "plugin got mergekit.merge_methods executed",
        "plugin got mergekit.plan executed",
        "plugin got mergekit.merge executed",
    ]


def test_without_mergekit_the_plugin_is_not_even_imported(tree: Tree) -> None:
    code = (
        "import sys, mergekit, mergekit.options; print('mergekit_dam.host.plugin' in sys.modules)"
    )
    assert tree.lines(INSTALL + code) == ["False"]


def test_modules_imported_before_the_hook_are_delivered_when_it_is_installed(tree: Tree) -> None:
    assert tree.lines("import mergekit.plan\n" + INSTALL + "import mergekit.merge") == [
        "plugin got mergekit.merge_methods executed",
        "plugin got mergekit.plan executed",
        "plugin got mergekit.merge executed",
    ]


def test_installing_twice_is_installing_once(tree: Tree) -> None:
    code = "import sys; before = len(sys.meta_path)\n" + INSTALL + INSTALL
    code += "import mergekit.merge_methods\n" + INSTALL + "print(len(sys.meta_path) - before)"
    assert tree.lines(code) == ["plugin got mergekit.merge_methods executed", "1"]


def test_a_reloaded_module_is_delivered_again(tree: Tree) -> None:
    code = "import importlib, mergekit.merge_methods\nimportlib.reload(mergekit.merge_methods)"
    assert tree.lines(INSTALL + code) == ["plugin got mergekit.merge_methods executed"] * 2


@pytest.mark.parametrize("plugin", FAILING_PLUGINS.values(), ids=FAILING_PLUGINS)
def test_a_failing_plugin_is_one_warning_and_mergekit_works(tree: Tree, plugin: str | None) -> None:
    if plugin is None:
        (tree.root / "mergekit_dam/host/plugin.py").unlink()
    else:
        tree.write("mergekit_dam/host/plugin.py", plugin)
    code = "import mergekit.merge; print(mergekit.plan.LAST_LINE, mergekit.merge.LAST_LINE)"
    result = tree.run(INSTALL + code, "-W", "error")
    assert result.stdout == "executed executed\n"
    assert result.stderr.count("mergekit-dam could not hook into mergekit") == 1
    assert len(result.stderr.splitlines()) == 1


def test_a_failure_of_mergekit_itself_is_raised_as_ever(tree: Tree) -> None:
    tree.write("mergekit/plan.py", "import mergekit.merge_methods\nraise ImportError('theirs')")
    code = "try: import mergekit.plan\nexcept ImportError as error: print(error)"
    assert tree.lines(INSTALL + code) == ["plugin got mergekit.merge_methods executed", "theirs"]


@pytest.mark.parametrize(
    "first", ["mergekit_dam.request.method", "mergekit_dam.host.plugin", "mergekit.plan"]
)
def test_a_plugin_that_imports_its_own_modules_works_whichever_comes_first(
    tree: Tree, first: str
) -> None:
    tree.write("mergekit_dam/request/method.py", "import mergekit.plan\nMETHOD = 'dam'\n")
    tree.write(
        "mergekit_dam/host/plugin.py",
        "from mergekit_dam.request.method import METHOD\n"
        "def on_import(module): print(METHOD, module.__name__)\n",
    )
    assert tree.lines(INSTALL + f"import {first}") == [
        "dam mergekit.merge_methods",
        "dam mergekit.plan",
    ]


def test_an_imported_module_shows_its_original_loader(tree: Tree) -> None:
    tree.write("mergekit/merge_methods/template.txt", "a resource\n")
    code = """
import importlib.machinery, importlib.resources, inspect, pkgutil
import mergekit.merge_methods as module
assert type(module.__loader__) is importlib.machinery.SourceFileLoader
assert module.__spec__.loader is module.__loader__
print(inspect.getsource(module).strip())
print(pkgutil.get_data("mergekit.merge_methods", "template.txt").decode().strip())
print((importlib.resources.files(module) / "template.txt").read_text().strip())
"""
    got, *rest = tree.lines(INSTALL + code)
    assert got == "plugin got mergekit.merge_methods executed"
    assert rest == ["LAST_LINE = 'executed'", "a resource", "a resource"]


def test_the_loader_of_a_module_not_yet_executed_answers_as_the_original(tree: Tree) -> None:
    code = """
import importlib.util, runpy
spec = importlib.util.find_spec("mergekit.merge_methods")
print(spec.loader.is_package(spec.name), spec.loader.get_source(spec.name).strip())
print(hasattr(spec.loader, "no_such_attribute"))
print(runpy.run_module("mergekit.options")["__name__"])
"""
    assert tree.lines(INSTALL + code)[:3] == [
        "True LAST_LINE = 'executed'",
        "False",
        "mergekit.options",
    ]


def test_running_a_watched_module_as_a_script_works(tree: Tree) -> None:
    code = "import runpy; runpy.run_module('mergekit.plan', run_name='__main__')"
    assert tree.lines(INSTALL + code) == ["plugin got mergekit.merge_methods executed"]


def test_another_finder_may_search_through_ours(tree: Tree) -> None:
    code = """
import importlib.util, sys
class Searching:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if self.busy:
            return None
        self.busy = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy = False
sys.meta_path.insert({position}, Searching())
import mergekit.merge_methods
"""
    for position in (0, 1):
        lines = tree.lines(INSTALL + code.format(position=position))
        assert lines == ["plugin got mergekit.merge_methods executed"]


def test_the_hook_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules)\n" + INSTALL
    code += "print(sorted(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "['mergekit_dam', 'mergekit_dam.autoload']\n"


def test_importing_the_package_loads_none_of_the_heavy_ones() -> None:
    code = "import sys, mergekit_dam, mergekit_dam.autoload as a; a.install()\n"
    code += "print({'torch', 'transformers', 'mergekit', 'numpy', 'pydantic'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")


class TestTheStartupFiles:
    """The two files at the root of site-packages that call `install`."""

    def start(self, tree: Tree) -> list[str]:
        """Read the .pth as the interpreter's start does; the tree takes site-packages' part."""
        shutil.copy(PACKAGE / "mergekit_dam_autoload.pth", tree.root)
        code = f"import site, sys; sys.path.clear(); site.addsitedir({str(tree.root)!r})\n"
        return tree.lines(code + "import mergekit.merge_methods; print('alive')", "-I")

    def test_the_pth_installs_the_hook(self, tree: Tree) -> None:
        assert self.start(tree) == ["plugin got mergekit.merge_methods executed", "alive"]

    def test_the_pth_is_one_line_for_older_pythons_read_each_line_alone(self) -> None:
        assert (PACKAGE / "mergekit_dam_autoload.pth").read_text().count("\n") == 1

    @pytest.mark.parametrize("autoload", ["def install(", "raise RuntimeError", "import absent"])
    def test_a_broken_hook_breaks_no_process(self, tree: Tree, autoload: str) -> None:
        tree.write("mergekit_dam/autoload.py", autoload)
        assert self.start(tree) == ["alive"]

    def test_a_pth_left_without_its_package_breaks_no_process(self, tree: Tree) -> None:
        shutil.rmtree(tree.root / "mergekit_dam")
        assert self.start(tree) == ["alive"]

    def test_the_start_file_names_the_same_function(self) -> None:
        """Python 3.15 reads it in place of the .pth (PEP 829); that Python is not supported yet."""
        text = (PACKAGE / "mergekit_dam_autoload.start").read_text()
        assert text == "mergekit_dam.autoload:install\n"
