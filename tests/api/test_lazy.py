"""What an import of the package loads, and what it offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_dam

CHECKOUT = Path(__file__).parents[2]


def test_an_import_loads_nothing_that_a_bare_interpreter_does_not_have() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import mergekit_dam; dir(mergekit_dam)\n"
        "print(sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "['mergekit_dam']\n"


def test_every_public_name_is_there_and_listed() -> None:
    for name in mergekit_dam.__all__:
        assert getattr(mergekit_dam, name).__name__ == name
        assert name in dir(mergekit_dam)


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'mergekit_dam' has no attribute 'fit'"):
        mergekit_dam.fit  # noqa: B018


def test_public_functions_stay_when_packages_are_imported() -> None:
    code = (
        "import mergekit_dam.reports.page, mergekit_dam.evaluation.evaluation\n"
        "import mergekit_dam.estimate.estimate, mergekit_dam.api.merging\n"
        "import mergekit_dam as own\n"
        "print(all(callable(getattr(own, name)) for name in own.__all__))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n"
