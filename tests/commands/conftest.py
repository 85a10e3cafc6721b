"""How the tests of commands run them."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from mergekit.io.tasks import LoaderCache

from mergekit_dam.cli import main

Run = Callable[..., Result]


@pytest.fixture
def command() -> Run:
    """Run `mergekit-dam` with some arguments, in this process."""

    def run(*arguments: object) -> Result:
        LoaderCache.loaders.clear()
        return CliRunner().invoke(main, list(map(str, arguments)), prog_name="mergekit-dam")

    return run
