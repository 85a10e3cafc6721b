"""The command `plan`."""

from pathlib import Path

import click

from mergekit_dam.cli.early import tell_early
from mergekit_dam.command_line import (
    Command,
    device_options,
    json_option,
    print_json,
    resolved_device,
    terminal_width,
)
from mergekit_dam.estimate.gpus import GPUS


@click.command(
    "plan",
    cls=Command,
    example="mergekit-dam plan dam.yaml ./out\nmergekit-dam plan dam.yaml --gpu h100 --json",
    exit_codes={0: "estimated; see `problems` for what would not fit"},
)
@click.argument(
    "config", metavar="CONFIG_FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.argument("out_path", required=False, type=click.Path(path_type=Path))
@device_options(default="cpu")
@click.option(
    "--gpu",
    metavar="NAME",
    type=click.Choice(sorted(GPUS), case_sensitive=False),
    help="Estimate a merge on this GPU, which need not be here, from its published rates: "
    f"{', '.join(sorted(GPUS))}. Disk and host memory are those of this machine.",
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
@json_option
def plan(
    config: Path,
    out_path: Path | None,
    device: str,
    gpu: str | None,
    out_shard_size: str,
    transformers_cache: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Check a configuration and estimate its costs.

    Prints bytes, flops, memory and time, and what would not fit. Reads configurations and
    headers, but no weights and no text, and measures the speed of this machine for two seconds
    (with --gpu, that of its disk alone).

    \b
    Words of the output:
    source      a model or the base
    sweep       one pass over all blocks of the models
    survey      the sweep that judges the average, where
                the fit starts
    teachers    the models on their own text, whose outputs
                the merge is fitted to
    layer fits  the sweep that fits each layer
    descent     gradient steps on the whole model
    Gram        products of inputs, which a fit adds up
    solves      linear systems for the coefficients
    streams     hidden states kept between blocks
    examples/plan.md explains every line.
    """
    if out_path is not None and out_path.suffix == ".json":
        raise click.UsageError(f"--json prints on stdout: write `--json > {out_path}`")
    if device != "cpu" and gpu is not None:
        raise click.UsageError(
            "--device and --cuda are this machine's, --gpu another GPU: give one of them"
        )
    tell_early(config)
    from mergekit.common import parse_kmb
    from mergekit.options import MergeOptions

    from mergekit_dam.estimate import estimate as run
    from mergekit_dam.estimate import report

    try:
        shard = parse_kmb(out_shard_size)
    except ValueError as error:
        raise click.BadParameter(
            f"required a number such as 5B or 500M, got {out_shard_size!r}",
            param_hint="--out-shard-size",
        ) from error
    options = MergeOptions(
        device=resolved_device(device),
        out_shard_size=shard,
        transformers_cache=transformers_cache,
        trust_remote_code=trust_remote_code,
        quiet=True,
    )
    estimate = run.run_plan(config, out_path, options, GPUS[gpu] if gpu else None)
    if as_json:
        print_json(report.to_json(estimate))
    else:
        click.echo(report.table(estimate, terminal_width()))
