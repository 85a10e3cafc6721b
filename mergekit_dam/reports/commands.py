"""The command `mergekit-dam report`; slow imports stand inside it."""

from pathlib import Path

import click

from mergekit_dam.command_line import Command, json_option, print_json


@click.command("report", cls=Command, example="mergekit-dam report ./out")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--html",
    "page",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the page goes. Default: dam_report.html in OUT, if nothing else is asked for.",
)
@click.option(
    "--png",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a map of the coefficients; needs matplotlib (the extra `plot`).",
)
@json_option
def report(out: Path, page: Path | None, png: Path | None, as_json: bool) -> None:
    """Make the page of a merge again, or a picture of it.

    Reads dam_report.json in OUT, the folder of a merged model, and no weights.
    """
    from mergekit_dam.coefficients.file import REPORT_NAME
    from mergekit_dam.reports.numbers import numbers_of
    from mergekit_dam.reports.page import remake_page
    from mergekit_dam.reports.schema import read

    own = read(out / REPORT_NAME)
    if png is not None:
        from mergekit_dam.reports.figure import write_figure

        write_figure(own, png)
        click.echo(str(png), err=as_json)
    if page is not None or not (png or as_json):
        click.echo(str(remake_page(out, page)), err=as_json)
    if as_json:
        print_json(numbers_of(own))
