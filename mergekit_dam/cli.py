"""The command `mergekit-dam` with its subcommands `merge`, `plan`, `report`, `demo` and `evaluate`.

Slow imports stand inside the commands, so that help and usage errors appear at once.
"""

import json
import os
from pathlib import Path

import click

from mergekit_dam import __version__
from mergekit_dam.estimate.gpus import GPUS
from mergekit_dam.report.commands import report as report_command


class _PassThrough(click.Command):
    """A command that passes its whole command line, with `--help`, to another command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written at the end of the work.

    Raises:
        click.BadParameter: Its folder does not exist, or one may not write there.
    """
    place = path if path.exists() else path.absolute().parent
    if not os.access(place, os.W_OK):
        reason = "is not writable" if place.exists() else "does not exist"
        raise click.BadParameter(f"{place} {reason}; name another file", param_hint="--json")


@click.group()
@click.version_option(__version__, prog_name="mergekit-dam")
def main() -> None:
    """Differentiable Adaptive Merging (arXiv 2410.08371) as a merge method of mergekit.

    With this package installed, mergekit's own command knows the method:

        mergekit-yaml dam.yaml ./out
    """


main.add_command(report_command)


@main.command("merge", cls=_PassThrough)
@click.pass_context
def merge(ctx: click.Context) -> None:
    """Run mergekit-yaml, with `dam` registered first.

    For installations in which mergekit-yaml does not find plugins. Takes the same arguments
    and options.
    """
    from mergekit_dam.host import plugin

    plugin.install()
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    mergekit_yaml.main(args=ctx.args, prog_name=ctx.command_path, standalone_mode=False)


@main.command("plan")
@click.argument(
    "config", metavar="CONFIG_FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.argument("out_path", default=".", type=click.Path(path_type=Path))
@click.option("--cuda", is_flag=True, help="Estimate a merge that runs with --cuda.")
@click.option(
    "--gpu",
    type=click.Choice(sorted(GPUS), case_sensitive=False),
    help="Estimate a merge on this GPU, which need not be here, from its published rates. Disk and "
    "host memory are those of this machine.",
)
@click.option(
    "--out-shard-size",
    default="5B",
    show_default=True,
    metavar="SIZE",
    help="As for the merge: merged tensors stay in memory until a shard is full.",
)
@click.option("--transformers-cache", metavar="PATH", help="As for the merge.")
@click.option("--trust-remote-code", is_flag=True, help="As for the merge.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the tables.")
def plan(
    config: Path,
    out_path: Path,
    cuda: bool,
    gpu: str | None,
    out_shard_size: str,
    transformers_cache: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Estimate the cost of a merge before it starts.

    Prints bytes, flops, memory and time, and what would not fit. Reads configurations and
    headers, but no weights and no text, and measures the speed of this machine for two seconds
    (with --gpu, that of its disk alone).
    """
    from mergekit.common import parse_kmb
    from mergekit.options import MergeOptions

    from mergekit_dam.estimate import estimate as run
    from mergekit_dam.estimate import report

    if cuda and gpu is not None:
        raise click.UsageError("--cuda is this machine's GPU, --gpu another: give one of them")
    try:
        shard = parse_kmb(out_shard_size)
    except ValueError as error:
        raise click.BadParameter(
            f"required a number such as 5B or 500M, got {out_shard_size!r}",
            param_hint="--out-shard-size",
        ) from error
    options = MergeOptions(
        cuda=cuda,
        out_shard_size=shard,
        transformers_cache=transformers_cache,
        trust_remote_code=trust_remote_code,
        quiet=True,
    )
    estimate = run.run_plan(config, out_path, options, GPUS[gpu] if gpu else None)
    if as_json:
        click.echo(json.dumps(report.to_json(estimate), indent=2))
    else:
        click.echo(report.table(estimate))


@main.command("demo")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of text, weights and training.")
@click.option("--force", is_flag=True, help="Write into a folder even if it has other files.")
def demo(directory: Path, seed: int, force: bool) -> None:
    """Make three tiny specialists, merge them, and compare.

    Everything is made in DIRECTORY, on the CPU, in a few minutes, without a network: text,
    a base model, specialists for Python code, word problems and records, the YAML files
    and, with mergekit-yaml, four merges of the specialists. Prints a table of held-out losses
    at the end. The same seed gives the same table, on the same machine with the same number
    of threads.
    """
    from mergekit_dam.demo.run import run_demo
    from mergekit_dam.demo.settings import DemoSettings

    click.echo(run_demo(directory, settings=DemoSettings(seed=seed), force=force).table())
    click.echo("recovery: 0 for mergekit's linear, 1 for each specialist on its domain", err=True)


@main.command("evaluate")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    "files",
    metavar="FILE",
    multiple=True,
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Held-out text, in any form that `calibration` takes. Repeat for more texts.",
)
@click.option(
    "--sequence-length",
    default=256,
    show_default=True,
    type=click.IntRange(min=2),
    help="Tokens per sequence.",
)
@click.option(
    "--sequences",
    default=24,
    show_default=True,
    type=click.IntRange(min=1),
    help="Sequences per text, at most.",
)
@click.option(
    "--batch-size",
    default=4,
    show_default=True,
    type=click.IntRange(min=1),
    help="Sequences per forward pass.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps, ...")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="Dtype in which weights are loaded; auto keeps the stored one.",
)
@click.option(
    "--json",
    "json_path",
    metavar="PATH",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=str),
    help="Also write the losses as JSON; with -, print them as JSON instead of the table.",
)
def evaluate(
    models: tuple[str, ...],
    files: tuple[Path, ...],
    sequence_length: int,
    sequences: int,
    batch_size: int,
    device: str,
    dtype: str,
    json_path: str | None,
) -> None:
    """Measure the cross-entropy of models on held-out text.

    Losses are in nats per token. Every MODEL, a folder or an id on the Hub, reads the same
    documents in the same order.
    """
    from mergekit_dam import evaluate as evaluation

    settings = evaluation.EvaluationSettings(
        sequence_length=sequence_length,
        sequences=sequences,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    if json_path is not None and json_path != "-":
        require_writable(Path(json_path))
    result = evaluation.evaluate(models, files, settings)
    text = json.dumps(result.to_json(), indent=2, allow_nan=False)
    if json_path == "-":
        click.echo(text)
        return
    click.echo(result.table())
    if json_path is not None:
        Path(json_path).write_text(text + "\n", encoding="utf-8")
