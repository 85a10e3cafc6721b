"""The command `init`."""

import shlex
from pathlib import Path

import click

from mergekit_dam.command_line import Command, json_option, print_json

_EXAMPLE = """
mergekit-dam init org/math=math.jsonl org/german=de/ \\
    --base org/base
mergekit-dam init --from ties.yml math=math.jsonl \\
    german=de/ -o dam.yaml
"""


@click.command("init", cls=Command, example=_EXAMPLE)
@click.argument("texts", metavar="MODEL=TEXT...", nargs=-1)
@click.option("--base", metavar="MODEL", help="Model that the others were fine-tuned from.")
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take the models and settings of a mergekit configuration, of any method.",
)
@click.option(
    "-o",
    "--output",
    default="dam.yaml",
    show_default=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="File to write; - is stdout.",
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
def init(
    texts: tuple[str, ...],
    base: str | None,
    source: Path | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write a configuration, with comments.

    TEXT is a file, a folder, a dataset of the Hub, or `self` (the model writes it). With
    --from, the last part of a model's name is enough. What is written passes the checks of a
    merge; what could not be kept is said, and stands in the file.
    """
    named = _named(texts)
    if source is None and not named:
        raise click.UsageError("required MODEL=TEXT for each model, or --from FILE")
    if source is not None and base is not None:
        raise click.UsageError("--base: with --from, the base is that of the file; leave it out")
    if str(output) != "-" and output.exists() and not force:
        raise click.UsageError(f"{output} exists; give another with -o, or --force")
    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"{output.absolute().parent} does not exist; make it first")
    from mergekit_dam.configure.draft import checked, of_file, of_names, with_texts
    from mergekit_dam.configure.text import written

    found = of_names(named, base) if source is None else of_file(source)
    found = with_texts(found, named)
    notes = [*(f"Changed: {said}." for said in found.changes)]
    notes += [f"Not kept: {said}." for said in found.lost]
    text = written(found.tree, notes)
    checked(text)
    if str(output) == "-" and not as_json:
        click.echo(text, nl=False)
    elif str(output) != "-":
        output.write_text(text, encoding="utf-8")
    if as_json:
        print_json(
            {
                "file": None if str(output) == "-" else str(output),
                "configuration": found.tree,
                "changed": found.changes,
                "not_kept": found.lost,
            }
        )
        return
    for note in notes:
        click.echo(note, err=True)
    if str(output) != "-":
        place = shlex.quote(str(output))
        click.echo(f"Wrote {output}. Next: mergekit-dam plan {place}", err=True)


def _named(texts: tuple[str, ...]) -> dict[str, str]:
    """Model -> text, of arguments such as `org/math=math.jsonl:samples=16`."""
    found: dict[str, str] = {}
    for argument in texts:
        model, equals, text = argument.partition("=")
        if not (model and equals and text):
            raise click.BadParameter(
                f"required MODEL=TEXT, such as org/math=data/math.jsonl, got {argument!r}",
                param_hint="MODEL=TEXT",
            )
        if model in found:
            raise click.BadParameter(f"{model} is there twice", param_hint="MODEL=TEXT")
        found[model] = text
    return found
