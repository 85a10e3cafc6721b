"""Merges of the same models by every method, compared on text that none of them has seen.

    python examples/benchmarks/quality.py --demo --out quality-demo
    python examples/benchmarks/quality.py --base BASE \\
        --model python=PATH --model german=BASE+ADAPTER \\
        --text python=python.jsonl --text german=german.jsonl --out quality

One table of held-out losses, recovery, seconds and peak memory: the base, the specialists,
mergekit's methods with a small grid each, RegMean, the end-to-end objective of the DAM paper, and
`dam`. It is printed, and written as `quality.md` and, with every point of every grid, as
`quality.json`.
"""

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.merge_quality.documents import Sources

_TEXTS = ("text", "calibration", "validation", "test")
_NAMED = "NAME=PATH"


@click.command(help=__doc__.partition("\n")[0])
@click.option("--demo", is_flag=True, help="Compare the demo's models, made first if need be.")
@click.option(
    "--demo-folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where `mergekit-dam demo` has put them, or will.  [default: OUT/demo]",
)
@click.option("--base", metavar="MODEL", help="Base model, for the methods that take one.")
@click.option(
    "--model", "models", metavar=_NAMED, multiple=True, help="A specialist, in order of merging."
)
@click.option("--text", metavar=_NAMED, multiple=True, help="Text to split into all three parts.")
@click.option("--calibration", metavar=_NAMED, multiple=True, help="Text to fit on.")
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
    "--samples",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Calibration sequences per model, for every method that uses text.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option(
    "--validation-sequences",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Sequences per domain to choose by, at most.",
)
@click.option(
    "--test-sequences",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Sequences per domain to report on, at most.",
)
@click.option(
    "--reference-steps",
    type=click.IntRange(min=1),
    help="Steps of the end-to-end objectives.  [default: one for every sample]",
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
    default="float32",
    show_default=True,
    help="What merges are computed and written in.",
)
@click.option("--device", default="cpu", show_default=True, help="Such as cuda or cuda:1.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--lora-merge-cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of merged adapters, as mergekit's.  [default: OUT/adapters]",
)
@click.option("--keep", is_flag=True, help="Leave every method's best merge in OUT/merged.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("quality"),
    show_default=True,
    help="Folder for the results and all that is made on the way.",
)
def main(
    demo: bool,
    demo_folder: Path | None,
    base: str | None,
    models: tuple[str, ...],
    text: tuple[str, ...],
    calibration: tuple[str, ...],
    validation: tuple[str, ...],
    test: tuple[str, ...],
    shares: tuple[float, float, float],
    samples: int,
    sequence_length: int,
    validation_sequences: int,
    test_sequences: int,
    reference_steps: int | None,
    variants: tuple[str, ...],
    only: tuple[str, ...],
    skip: tuple[str, ...],
    dtype: str,
    device: str,
    seed: int,
    lora_merge_cache: Path | None,
    keep: bool,
    out: Path,
) -> None:
    """Read the command line and run the comparison."""
    # Of a script, only its own folder is on the path. Last: an installed mergekit_dam goes first.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from examples.benchmarks.measuring.options import output_folder, parse_variant
    from examples.benchmarks.merge_quality.documents import Shares
    from examples.benchmarks.merge_quality.methods import Choices
    from examples.benchmarks.merge_quality.run import Settings, compare

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the merge that runs, too
    settings = Settings(
        out=output_folder(out),
        shares=Shares(calibration=shares[0], validation=shares[1], test=shares[2]),
        samples=samples,
        sequence_length=sequence_length,
        sequences={"validation": validation_sequences, "test": test_sequences},
        dtype=dtype,
        device=device,
        seed=seed,
        adapter_cache=lora_merge_cache,
        keep=keep,
    )
    choices = Choices(
        variants=dict(map(parse_variant, variants)),
        reference_steps=reference_steps,
        only=only,
        skip=skip,
    )
    texts = dict(zip(_TEXTS, (text, calibration, validation, test), strict=True))
    if demo:
        if base or models or any(texts.values()):
            raise click.UsageError("--demo brings its own models and texts")
        what, sources = _demo(demo_folder or out / "demo")
    else:
        what, sources = _given(base, models, texts)
    try:
        report = compare(what, sources, settings, choices)
    except KeyboardInterrupt:
        click.echo(f"Stopped; the rows that were finished are in {out}", err=True)
        raise SystemExit(130) from None
    click.echo(report.table())
    click.echo(f"Written to {out / 'quality.md'} and {out / 'quality.json'}", err=True)


def _given(
    base: str | None, models: Iterable[str], texts: dict[str, tuple[str, ...]]
) -> "tuple[Models, dict[str, Sources]]":
    """Models and texts as the command line names them."""
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.measuring.options import named_paths
    from examples.benchmarks.merge_quality.documents import Sources

    specialists = named_paths(models, "--model")
    if not specialists:
        raise click.UsageError("name the specialists with --model NAME=PATH, or pass --demo")
    files = {part: named_paths(given, f"--{part}") for part, given in texts.items()}
    for part, own in files.items():
        for name in own.keys() - specialists.keys():
            raise click.UsageError(f"--{part} {name}=...: no --model has that name")
    sources = {
        name: Sources(**{part: own[name] for part, own in files.items() if name in own})
        for name in specialists
    }
    return Models(specialists, base), sources


def _demo(folder: Path) -> "tuple[Models, dict[str, Sources]]":
    """The demo's models and texts, made if they are not there."""
    from examples.benchmarks.measuring.models import Models
    from examples.benchmarks.merge_quality.documents import Sources
    from mergekit_dam.demo.recipes import text_path
    from mergekit_dam.demo.run import run_demo
    from mergekit_dam.demo.texts import DOMAINS

    if not (folder / "losses.json").is_file():  # written last: what is there is whole
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
