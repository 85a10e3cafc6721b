"""The command `inspect`."""

from dataclasses import asdict
from pathlib import Path

import click

from mergekit_dam.command_line import Command, json_option, print_json, terminal_width


@click.command("inspect", cls=Command, example="mergekit-dam inspect ./out")
@click.argument("path", metavar="FILE_OR_FOLDER", type=click.Path(path_type=Path, exists=True))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show which models dominate where in a merge.

    FILE_OR_FOLDER is a dam_coefficients.safetensors or the folder of a merge. No weights are
    read, only coefficients and corrections.
    """
    from mergekit_dam.inspection.summary import summarised
    from mergekit_dam.inspection.tables import summary_table

    found = summarised(path)
    if as_json:
        shares = {"means": found.means, "dominates": found.dominates}
        print_json({**asdict(found), **shares})
    else:
        click.echo(summary_table(found, terminal_width()))
