"""How the tests of commands run them."""

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mergekit.io.tasks import LoaderCache

from mergekit_dam.cli import main
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration

Run = Callable[..., Result]


@pytest.fixture
def command() -> Run:
    """Run `mergekit-dam` with some arguments, in this process."""

    def run(*arguments: object) -> Result:
        LoaderCache.loaders.clear()
        return CliRunner().invoke(main, list(map(str, arguments)), prog_name="mergekit-dam")

    return run


@pytest.fixture(scope="session")
def configuration(llama_models: Models, calibration: Calibration) -> dict[str, Any]:
    """A merge of a second."""
    return dam(llama_models.models, calibration, base=llama_models.base)


@pytest.fixture(scope="session")
def merged(configuration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return merge(configuration, tmp_path_factory.mktemp("merged") / "out")
