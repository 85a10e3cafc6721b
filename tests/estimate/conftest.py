"""The inventory of a merge of the session's models."""

from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.estimate.inventory import Inventory
from tests.kit.estimates import inventory
from tests.kit.merging import dam
from tests.kit.models import Models


@pytest.fixture
def take(tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]) -> Any:
    """The inventory of the session's models with some parameters of the merge."""

    def take(**parameters: Any) -> Inventory:
        configuration = dam(llama_models.models, calibration, base=llama_models.base, **parameters)
        return inventory(tmp_path, configuration)

    return take
