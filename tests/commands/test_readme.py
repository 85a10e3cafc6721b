"""The README says what the code says."""

from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.help import parameter_tables

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_parameters_are_made_from_their_fields() -> None:
    assert parameter_tables() in README


@pytest.mark.parametrize("block", [b for b in README.split("```")[1:] if b.startswith("yaml")])
def test_every_configuration_shown_is_valid(block: str) -> None:
    source = yaml.safe_load(block.removeprefix("yaml"))
    check_configuration(MergeConfiguration.model_validate(source), source)
