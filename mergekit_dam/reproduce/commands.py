"""The commands `mergekit-dam verify` and `mergekit-dam reproduce`.

Slow imports stand inside the commands, so that help and usage errors appear at once.
"""

from pathlib import Path

import click

from mergekit_dam.command_line import Command, json_option, print_json


@click.command(
    "verify",
    cls=Command,
    example="mergekit-dam verify ./out",
    exit_codes={0: "nothing differs", 1: "something differs, or could not be checked"},
)
@click.argument("folder", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@json_option
@click.pass_context
def verify(ctx: click.Context, folder: Path, as_json: bool) -> None:
    """Check a merged model against the dam_lock.json beside it.

    Every tensor is hashed, and so are the coefficients, the tokenizer and all other files. Exits
    with 1 and names what differs if anything does.
    """
    from mergekit_dam.reproduce.verify import verify as run

    verdict = run(folder, quiet=as_json)
    print_json(verdict.to_json()) if as_json else click.echo(str(verdict))
    ctx.exit(1 if verdict.differences else 0)


@click.command(
    "reproduce",
    cls=Command,
    example="mergekit-dam reproduce ./out/dam_lock.json",
    exit_codes={0: "byte-identical", 1: "something differs, or could not be made"},
)
@click.argument("lock", metavar="LOCK", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--to",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the model there. By default it is removed when it was compared.",
)
@click.option(
    "--refit",
    is_flag=True,
    help="Fit the coefficients again, which needs the text, in place of a replay of those beside "
    "the lock.",
)
@click.option(
    "--models",
    metavar="DIR|NAME=DIR",
    multiple=True,
    help="A folder that holds local models of the lock, or the folder of one by its name there. "
    "Looked for by default: beside the lock and up to three folders above, and here.",
)
@click.option(
    "--texts",
    metavar="DIR|NAME=PATH",
    multiple=True,
    help="The same for calibration text, which --refit needs.",
)
@click.option("--cuda", is_flag=True, help="Compute on the GPU.")
@click.option("--device", help="Compute on this device. Default: the kind that the merge had.")
@click.option("--transformers-cache", metavar="PATH", help="As for the merge.")
@json_option
@click.pass_context
def reproduce(
    ctx: click.Context,
    lock: Path,
    to: Path | None,
    refit: bool,
    models: tuple[str, ...],
    texts: tuple[str, ...],
    cuda: bool,
    device: str | None,
    transformers_cache: str | None,
    as_json: bool,
) -> None:
    """Make a merge again from its lock, and compare.

    LOCK is a dam_lock.json or its folder. Models of the Hub are taken at the commit of the merge,
    local ones are found by name; both have to have the files of the merge. Exits with 0 if the
    result is byte-identical, and with 1 if it is not: then it says which tensors differ, and by
    how much.
    """
    from mergekit_dam.reproduce.reproduce import reproduce as run

    if cuda and device is not None:
        raise click.UsageError("--cuda is --device cuda: give one of them")
    found = run(
        lock,
        to=to,
        refit=refit,
        given=(*models, *texts),
        device="cuda" if cuda else device,
        cache=transformers_cache,
        quiet=as_json,
    )
    print_json(found.to_json()) if as_json else click.echo(str(found))
    ctx.exit(1 if found.differences else 0)
