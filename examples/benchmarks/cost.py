r"""Costs of merges of the same models: seconds, memory, bytes, and their ratios to `linear`.

    python -m examples.benchmarks.cost --synthetic --rounds 5 --out cost
    python -m examples.benchmarks.cost --synthetic --sweep layers=12,24,48,96 --rounds 1 \\
        --out-shard-size 50M --out cost-depth
    python -m examples.benchmarks.cost --base BASE \\
        --model python=PATH --model german=BASE+ADAPTER \\
        --calibration python=python.jsonl --calibration german=german.jsonl --out cost

The rows are mergekit's `linear`, `dam` replayed from its coefficients, layer fits in either metric,
and `dam` with its defaults. They run in turns, and each merge is a process of its own. The table is
printed and written to `cost.md`; `cost.json` also holds every single run. A sweep repeats the
measurement for each value of a size, and shows memory by value as a table and a picture. mergekit
keeps merged tensors in memory until a shard is full: make shards small to see what else grows.
"""

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from examples.benchmarks.measuring.options import (
    CommonOptions,
    common_options,
    named_paths,
    named_texts,
    stoppable,
)

# What imports torch is imported when it is needed: `--help` answers at once.
if TYPE_CHECKING:
    from examples.benchmarks.merge_cost.settings import Inputs

_POSITIVE = click.IntRange(min=1)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--synthetic", is_flag=True, help="Make random models and measure merges of them.")
@click.option("--layers", type=int, default=12, show_default=True, help="Their decoder layers.")
@click.option("--hidden", type=int, default=576, show_default=True, help="Their hidden size.")
@click.option(
    "--intermediate", type=int, default=1536, show_default=True, help="Width inside their MLPs."
)
@click.option("--vocab", type=int, default=8192, show_default=True, help="Their vocabulary.")
@click.option("--models", type=int, default=3, show_default=True, help="Number of these models.")
@common_options(dtype="bfloat16", out="cost")
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
    "--out-shard-size", metavar="SIZE", help="For example 50M.  [default: mergekit's default]"
)
@click.option(
    "--cold",
    is_flag=True,
    help="Drop the models from the page cache before every merge, so that each merge reads them "
    "from storage and `disk GB` counts all of that.",
)
def main(
    common: CommonOptions,
    synthetic: bool,
    rounds: int,
    fit_rounds: int,
    sweeps: tuple[str, ...],
    out_shard_size: str | None,
    cold: bool,
    **sizes: int,
) -> None:
    """Read the command line and run the measurement."""
    from examples.benchmarks.merge_cost.methods import Choices
    from examples.benchmarks.merge_cost.run import measure_costs
    from examples.benchmarks.merge_cost.settings import Settings, Shape, parse_sweep

    settings = Settings(
        **common.settings(),
        rounds=rounds,
        fit_rounds=fit_rounds,
        out_shard_size=out_shard_size,
        cold=cold,
    )
    choices = Choices(**common.choices())
    if synthetic and (common.base or common.model or common.calibration):
        raise click.UsageError("--synthetic brings its own models and texts")
    source = Shape(**sizes, dtype=common.dtype, seed=common.seed) if synthetic else _inputs(common)
    with stoppable(common.out):
        report = measure_costs(source, settings, choices, list(map(parse_sweep, sweeps)))
    click.echo(report.tables())
    click.echo(f"Written to {common.out / 'cost.md'} and {common.out / 'cost.json'}", err=True)


def _inputs(common: CommonOptions) -> "Inputs":
    """Models and texts as the command line names them."""
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.merge_cost.settings import OF_SHAPE, Inputs

    context = click.get_current_context()
    for name in OF_SHAPE:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is a size of --synthetic models")
    models = named_paths(common.model, "--model")
    if not models:
        raise click.UsageError("name the models with --model NAME=PATH, or pass --synthetic")
    texts = named_texts(common.calibration, "--calibration", models)
    return Inputs(Models(models, common.base), texts)


if __name__ == "__main__":
    main()
