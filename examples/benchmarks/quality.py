r"""Merges of the same models by every method, compared on text that none of them has seen.

    python -m examples.benchmarks.quality --demo --out quality-demo
    python -m examples.benchmarks.quality --base BASE \\
        --model python=PATH --model german=BASE+ADAPTER \\
        --text python=python.jsonl --text german=german.jsonl --out quality

One table of held-out losses, recovery, seconds and peak memory: the base, the specialists,
mergekit's methods with a small grid each, RegMean, the end-to-end objective of the DAM paper, and
`dam`. It is printed and written to `quality.md`; `quality.json` also holds every point of every
grid.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from examples.benchmarks.measuring.options import (
    CommonOptions,
    common_options,
    named_paths,
    named_texts,
    stoppable,
)

# What imports torch is imported when it is needed: `--help` answers at once.
if TYPE_CHECKING:
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.merge_quality.documents import Sources

_NAMED = "NAME=PATH"
_POSITIVE = click.IntRange(min=1)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--demo", is_flag=True, help="Compare the demo's models; make them if need be.")
@click.option(
    "--demo-folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of `mergekit-dam demo`, made if it is not there.  [default: OUT/demo]",
)
@common_options(dtype="float32", out="quality")
@click.option("--text", metavar=_NAMED, multiple=True, help="Text to split into all three parts.")
@click.option(
    "--validation",
    metavar=_NAMED,
    multiple=True,
    help="Text to choose by; by default a share of the calibration text.",
)
@click.option("--test", metavar=_NAMED, multiple=True, help="Text to report on.")
@click.option(
    "--shares",
    nargs=3,
    type=click.FloatRange(min=0, min_open=True),
    default=(0.5, 0.2, 0.3),
    show_default=True,
    help="Calibration, validation and test share of a file's documents.",
)
@click.option(
    "--validation-sequences",
    type=_POSITIVE,
    default=8,
    show_default=True,
    help="Sequences per domain to choose by, at most.",
)
@click.option(
    "--test-sequences",
    type=_POSITIVE,
    default=24,
    show_default=True,
    help="Sequences per domain to report on, at most.",
)
@click.option(
    "--reference-steps",
    type=_POSITIVE,
    help="Steps of the end-to-end objectives.  [default: one for every sample]",
)
@click.option("--keep", is_flag=True, help="Leave every method's best merge in OUT/merged.")
def main(
    common: CommonOptions,
    demo: bool,
    demo_folder: Path | None,
    shares: tuple[float, float, float],
    validation_sequences: int,
    test_sequences: int,
    reference_steps: int | None,
    keep: bool,
    **texts: tuple[str, ...],
) -> None:
    """Read the command line and run the comparison."""
    from examples.benchmarks.merge_quality.documents import Shares
    from examples.benchmarks.merge_quality.methods import Choices
    from examples.benchmarks.merge_quality.run import compare
    from examples.benchmarks.merge_quality.settings import Settings

    settings = Settings(
        **common.settings(),
        shares=Shares(calibration=shares[0], validation=shares[1], test=shares[2]),
        sequences={"validation": validation_sequences, "test": test_sequences},
        keep=keep,
    )
    choices = Choices(**common.choices(), reference_steps=reference_steps)
    texts["calibration"] = common.calibration
    if demo:
        if common.base or common.model or any(texts.values()):
            raise click.UsageError("--demo brings its own models and texts")
        models, sources = _demo(demo_folder or common.out / "demo")
    else:
        models, sources = _inputs(common, texts)
    with stoppable(common.out):
        report = compare(models, sources, settings, choices)
    click.echo(report.table())
    click.echo(
        f"Written to {common.out / 'quality.md'} and {common.out / 'quality.json'}", err=True
    )


def _inputs(
    common: CommonOptions, texts: dict[str, tuple[str, ...]]
) -> "tuple[Models, dict[str, Sources]]":
    """Models and texts as the command line names them."""
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.merge_quality.documents import Sources

    specialists = named_paths(common.model, "--model")
    if not specialists:
        raise click.UsageError("name the specialists with --model NAME=PATH, or pass --demo")
    files = {part: named_texts(pairs, f"--{part}", specialists) for part, pairs in texts.items()}
    sources = {
        name: Sources(**{part: own[name] for part, own in files.items() if name in own})
        for name in specialists
    }
    return Models(specialists, common.base), sources


def _demo(folder: Path) -> "tuple[Models, dict[str, Sources]]":
    """The demo's models and texts, made if they are not there."""
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.merge_quality.documents import Sources
    from mergekit_dam.demo.recipes import text_path
    from mergekit_dam.demo.run import run_demo
    from mergekit_dam.demo.texts import DOMAINS

    if not (folder / "losses.json").is_file():  # written last: a folder that has it is complete
        run_demo(folder)
    sources = {
        domain: Sources(
            calibration=str(text_path(folder, domain, "calibration")),
            test=str(text_path(folder, domain, "test")),
        )
        for domain in DOMAINS
    }
    specialists = {domain: str(folder / domain) for domain in DOMAINS}
    return Models(specialists, str(folder / "base")), sources


if __name__ == "__main__":
    main()
