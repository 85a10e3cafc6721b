"""The command `diff`."""

from dataclasses import asdict
from pathlib import Path

import click

from mergekit_dam.command_line import Command, json_option, print_json, terminal_width


@click.command(
    "diff",
    cls=Command,
    example="mergekit-dam diff ./out ./other",
    exit_codes={0: "compared, whether they differ or not; `same` in JSON tells"},
)
@click.argument("first", metavar="A", type=click.Path(path_type=Path, exists=True))
@click.argument("second", metavar="B", type=click.Path(path_type=Path, exists=True))
@json_option
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Compare two merges by their coefficients.

    A and B are files of coefficients, or folders of merges. Shows which parameters, models and
    texts differ, and the layers whose coefficients differ most.
    """
    from mergekit_dam.inspection.difference import compared
    from mergekit_dam.inspection.tables import difference_table

    found = compared(first, second)
    if as_json:
        print_json({**asdict(found), "same": found.same})
    else:
        click.echo(difference_table(found, terminal_width()))
