"""The command `demo`."""

from pathlib import Path

import click

from mergekit_dam.command_line import Command, json_option, print_json


@click.command("demo", cls=Command, example="mergekit-dam demo ./demo")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of text, weights and training.")
@click.option("--force", is_flag=True, help="Write into a folder even if it has other files.")
@json_option
def demo(directory: Path, seed: int, force: bool, as_json: bool) -> None:
    """Make three tiny specialists, merge them, and compare.

    Everything is made in DIRECTORY, on the CPU, in a minute or two, without a network: text,
    a base model, specialists for Python code, word problems and records, the YAML files
    and, with mergekit-yaml, four merges of the specialists. Prints a table of held-out losses
    at the end. The same seed gives the same table, on the same machine with the same number
    of threads.
    """
    from mergekit_dam.demo.run import run_demo
    from mergekit_dam.demo.settings import DemoSettings

    result = run_demo(directory, settings=DemoSettings(seed=seed), force=force)
    if as_json:
        recovery = {model: result.recovery(model) for model in result.losses}
        print_json({"losses": result.losses, "recovery": recovery})
        return
    click.echo(result.table())
    click.echo("recovery: 0 for mergekit's linear, 1 for each specialist on its domain", err=True)
