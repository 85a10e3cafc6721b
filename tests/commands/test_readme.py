"""The documents say what the code says."""

from pathlib import Path

import pytest
from mergekit.config import MergeConfiguration

from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.document import single
from mergekit_dam.request.help import parameter_tables

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
CONFIGURATIONS = {
    f"{path.name} {number}": block.removeprefix("yaml")
    for path in [CHECKOUT / "README.md", *sorted((CHECKOUT / "examples").glob("*.md"))]
    for number, block in enumerate(path.read_text(encoding="utf-8").split("```"))
    if block.startswith("yaml")
}


def test_the_tables_of_parameters_are_made_from_their_fields() -> None:
    assert parameter_tables() in README


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_shown_is_valid(name: str) -> None:
    document = single(CONFIGURATIONS[name])
    check_configuration(MergeConfiguration.model_validate(document.tree), document)
