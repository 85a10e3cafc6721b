"""The documents say what the code says."""

import re
import shlex
from pathlib import Path

import click
import pytest
from mergekit.config import MergeConfiguration

from mergekit_dam.cli import main
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

_BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:\$ )?(mergekit-dam .*)$", re.MULTILINE)
COMMANDS = [
    line
    for path in [CHECKOUT / "README.md", *sorted((CHECKOUT / "examples").glob("*.md"))]
    for block in _BLOCK.findall(path.read_text(encoding="utf-8"))
    for line in _COMMAND.findall(block.replace("\\\n", " "))
]


def test_the_tables_of_parameters_are_made_from_their_fields() -> None:
    assert parameter_tables() in README


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_shown_is_valid(name: str) -> None:
    document = single(CONFIGURATIONS[name])
    check_configuration(MergeConfiguration.model_validate(document.tree), document)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_shown_has_options_that_it_knows(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    with click.Context(command, info_name=name, parent=context) as own:
        given, rest, _ = command.make_parser(own).parse_args(arguments)
        assert rest == []
        for parameter in command.params:
            assert not parameter.required or given.get(parameter.name or "")
