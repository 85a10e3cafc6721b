"""Parameters are read by the code that acts on them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_dam
from mergekit_dam.request.help import fields

PACKAGE = Path(mergekit_dam.__file__).parent


def acting() -> Iterator[Path]:
    """Files that may act on a parameter: not those that declare it or check it."""
    for file in PACKAGE.rglob("*.py"):
        if not {"parameters", "request"} & set(file.parts):
            yield file


def names_read() -> set[str]:
    """Attributes that are read, and strings that are used to look something up."""
    found = set()
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in acting()]
    # Methods of the parameters themselves: `held_out` reads `holdout`, for one.
    classes = ast.parse((PACKAGE / "parameters" / "__init__.py").read_text(encoding="utf-8"))
    trees += [node for node in ast.walk(classes) if isinstance(node, ast.FunctionDef)]  # type: ignore[misc]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize("name", [name for _, name, _ in fields()])
def test_every_parameter_is_read_by_what_acts_on_it(name: str) -> None:
    # The text of a model is read while the configuration is checked, and handed on.
    assert name in {*names_read(), "calibration"}
