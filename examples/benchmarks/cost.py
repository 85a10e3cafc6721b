"""What merges of the same models cost: seconds, memory, bytes, and their ratios to `linear`.

    python examples/benchmarks/cost.py --synthetic --rounds 5 --out cost
    python examples/benchmarks/cost.py --synthetic --sweep layers=12,24,48,96 --rounds 1 \\
        --out-shard-size 50M --out cost-depth
    python examples/benchmarks/cost.py --base BASE \\
        --model python=PATH --model german=BASE+ADAPTER \\
        --calibration python=python.jsonl --calibration german=german.jsonl --out cost

The rows are mergekit's `linear`, `dam` replayed from its coefficients, layer fits in either metric,
and `dam` as it is by default. They run in turns, each merge in a process of its own. The table is
printed, and written as `cost.md` and, with every single run, as `cost.json`. A sweep repeats all of
that for each value of a size, and shows memory by value as a table and a picture. mergekit keeps
what it has merged until a shard is full: to see what else grows, make shards small.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from examples.benchmarks.merge_cost.settings import Given

_OF_SHAPE = ("layers", "hidden", "intermediate", "vocab", "model_count")
_POSITIVE = click.IntRange(min=1)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--synthetic", is_flag=True, help="Measure on random models, made on the spot.")
@click.option("--layers", type=int, default=12, show_default=True, help="Decoder layers of them.")
@click.option("--hidden", type=int, default=576, show_default=True, help="Width of their stream.")
@click.option(
    "--intermediate", type=int, default=1536, show_default=True, help="Width inside their MLPs."
)
@click.option("--vocab", type=int, default=8192, show_default=True, help="Their vocabulary.")
@click.option(
    "--models", "model_count", type=int, default=3, show_default=True, help="How many of them."
)
@click.option("--base", metavar="MODEL", help="Base model; every row reads it too.")
@click.option(
    "--model", "models", metavar="NAME=PATH", multiple=True, help="A model, in order of merging."
)
@click.option(
    "--calibration",
    metavar="NAME=PATH",
    multiple=True,
    help="Text of a model, as `calibration:` takes it.",
)
@click.option(
    "--samples",
    type=_POSITIVE,
    default=16,
    show_default=True,
    help="Calibration sequences per model.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option(
    "--rounds", type=_POSITIVE, default=3, show_default=True, help="Runs of linear and replay."
)
@click.option(
    "--fit-rounds",
    type=_POSITIVE,
    default=1,
    show_default=True,
    help="Runs of rows that fit, in the first rounds.",
)
@click.option(
    "--sweep",
    "sweeps",
    metavar="NAME=VALUE,...",
    multiple=True,
    help="Measure at each of these values of layers, hidden, intermediate, vocab, models, samples "
    "or sequence_length.",
)
@click.option(
    "--dam",
    "variants",
    metavar="'NAME: KEY=VALUE, ...'",
    multiple=True,
    help="A further row of dam, with these parameters.",
)
@click.option("--only", metavar="ROW", multiple=True, help="Run these rows alone; * matches.")
@click.option("--skip", metavar="ROW", multiple=True, help="Leave out these rows; * matches.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="What merges are computed and written in, and synthetic models stored in.",
)
@click.option("--device", default="cpu", show_default=True, help="Such as cuda or cuda:1.")
@click.option("--out-shard-size", metavar="SIZE", help="Such as 50M; mergekit's default if unset.")
@click.option(
    "--cold",
    is_flag=True,
    help="Drop the models from the page cache before every merge, so that each reads them from "
    "storage and `disk GB` is what it reads of them.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--lora-merge-cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of merged adapters, as mergekit's.  [default: OUT/adapters]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("cost"),
    show_default=True,
    help="Folder for the results and all that is made on the way.",
)
@click.pass_context
def main(
    context: click.Context,
    synthetic: bool,
    layers: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    model_count: int,
    base: str | None,
    models: tuple[str, ...],
    calibration: tuple[str, ...],
    samples: int,
    sequence_length: int,
    rounds: int,
    fit_rounds: int,
    sweeps: tuple[str, ...],
    variants: tuple[str, ...],
    only: tuple[str, ...],
    skip: tuple[str, ...],
    dtype: str,
    device: str,
    out_shard_size: str | None,
    cold: bool,
    seed: int,
    lora_merge_cache: Path | None,
    out: Path,
) -> None:
    """Read the command line and run the measurement."""
    # Of a script, only its own folder is on the path. Last: an installed mergekit_dam goes first.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from examples.benchmarks.measuring.options import output_folder, parse_variant
    from examples.benchmarks.merge_cost.rows import Choices
    from examples.benchmarks.merge_cost.run import measure_costs
    from examples.benchmarks.merge_cost.settings import Settings, Shape, Source, parse_sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the merge that runs, too
    settings = Settings(
        out=output_folder(out),
        samples=samples,
        sequence_length=sequence_length,
        rounds=rounds,
        fit_rounds=fit_rounds,
        dtype=dtype,
        device=device,
        seed=seed,
        out_shard_size=out_shard_size,
        cold=cold,
        adapter_cache=lora_merge_cache,
    )
    choices = Choices(variants=dict(map(parse_variant, variants)), only=only, skip=skip)
    source: Source
    if synthetic:
        if base or models or calibration:
            raise click.UsageError("--synthetic brings its own models and texts")
        source = Shape(
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            vocab=vocab,
            models=model_count,
            dtype=dtype,
            seed=seed,
        )
    else:
        _refuse_shape(context)
        source = _given(base, models, calibration)
    try:
        report = measure_costs(source, settings, choices, [parse_sweep(text) for text in sweeps])
    except KeyboardInterrupt:
        click.echo(f"Stopped; the merges that were finished are in {out}", err=True)
        raise SystemExit(130) from None
    click.echo(report.tables())
    click.echo(f"Written to {out / 'cost.md'} and {out / 'cost.json'}", err=True)


def _refuse_shape(context: click.Context) -> None:
    """Raise click.UsageError if a shape is asked of models that have theirs."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in _OF_SHAPE and source is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} is a size of --synthetic models")


def _given(base: str | None, models: tuple[str, ...], calibration: tuple[str, ...]) -> "Given":
    """Models and texts as the command line names them."""
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.measuring.options import named_paths
    from examples.benchmarks.merge_cost.settings import Given

    named = named_paths(models, "--model")
    if not named:
        raise click.UsageError("name the models with --model NAME=PATH, or pass --synthetic")
    texts = named_paths(calibration, "--calibration")
    for name in texts.keys() - named.keys():
        raise click.UsageError(f"--calibration {name}=...: no --model has that name")
    return Given(Models(named, base), texts)


if __name__ == "__main__":
    main()
