"""The examples in docstrings of the public interface say what happens."""

import doctest
import importlib
import shutil
from pathlib import Path

import pytest

import mergekit_dam

EXAMPLES = [
    test
    for name in ("coefficients", "evaluating", "merging", "reporting")
    for test in doctest.DocTestFinder(exclude_empty=True).find(
        importlib.import_module(f"mergekit_dam.api.{name}")
    )
    if test.examples
]


def test_every_public_function_has_an_example() -> None:
    shown = {test.name.rpartition(".")[2] for test in EXAMPLES}
    assert shown == set(mergekit_dam.__all__) - {"DamError"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_the_example_holds(example: doctest.DocTest, folder: Path) -> None:
    if example.name.endswith(".merge"):
        shutil.rmtree(folder / "merged")
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=printed.append).failed == 0, "".join(printed)
