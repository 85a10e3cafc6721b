"""Private names of mergekit and transformers stand in one file each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_dam

PACKAGE = Path(mergekit_dam.__file__).parent

PUBLIC = {
    "mergekit": {
        "mergekit",  # `merge_methods`, the registry
        "mergekit.common",
        "mergekit.config",
        "mergekit.graph",
        "mergekit.merge_methods.base",
        "mergekit.options",
        "mergekit.scripts.run_yaml",  # the command itself
    },
    "transformers": {"transformers", "transformers.utils"},
}
"""Modules that any file may import from; of `mergekit.graph`, `Task` alone."""


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, those inside of functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def private(project: str, file: Path) -> list[str]:
    """Imports of a file that its project may change without notice."""
    return [
        f"{module}.{name}"
        for module, name in imported(file)
        if module.split(".")[0] == project
        and (
            module not in PUBLIC[project]
            or name.startswith("_")
            or (module == "mergekit.graph" and name != "Task")
        )
    ]


@pytest.mark.parametrize(
    ("project", "allowed"), [("mergekit", "host/compat.py"), ("transformers", "model/compat.py")]
)
def test_private_names_are_imported_in_one_file_alone(project: str, allowed: str) -> None:
    found = {
        str(file.relative_to(PACKAGE)): names
        for file in sorted(PACKAGE.rglob("*.py"))
        if (names := private(project, file))
    }
    assert found.pop(allowed), f"{allowed} has none: is the list of public modules too long?"
    assert not found
