"""A whole measurement, step by step.

1. Make random models, or merge the adapters of existing models.
2. If coefficients are to be replayed, fit some, unmeasured.
3. Run the rounds: in each, every row merges once, in a process of its own.
4. With a sweep, do so for each of its values.
5. After every merge, write JSON and Markdown: a run that is stopped keeps what it has finished.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from examples.benchmarks.measuring.machine import command_line, machine
from examples.benchmarks.measuring.merges import Point, configuration, merge_command
from examples.benchmarks.measuring.models import resolve_all
from examples.benchmarks.measuring.processes import Measured, Runner, failure, run_measured
from examples.benchmarks.merge_cost import page_cache, plot, synthetic
from examples.benchmarks.merge_cost.methods import ANY_FIT, REPLAY, Choices, Merge, select
from examples.benchmarks.merge_cost.results import LINEAR, Comparison, Report, Row
from examples.benchmarks.merge_cost.settings import (
    Inputs,
    Settings,
    Shape,
    Source,
    Sweep,
    every_case,
)
from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME
from mergekit_dam.errors import DamError


@dataclass(frozen=True)
class Bench:
    """The data that every merge needs.

    Attributes:
        run: runs the command of a merge.
    """

    inputs: Inputs
    settings: Settings
    run: Runner


def measure_costs(
    source: Source,
    settings: Settings,
    choices: Choices,
    sweeps: Sequence[Sweep] = (),
    *,
    run: Runner = run_measured,
) -> Report:
    """Run the measurement; the steps are listed above.

    Raises:
        DamError: if what was asked for cannot be done. A merge that fails is a row instead.
        KeyboardInterrupt: as it comes; finished merges are written by then.
    """
    merges = select(choices, coefficients=settings.out / "coefficients" / FILE_NAME)
    cases = every_case(source, settings, sweeps)
    _require_calibrations(source, merges)
    for folder in ("configs", "logs", "merged", "coefficients"):
        (settings.out / folder).mkdir(parents=True, exist_ok=True)
    report = Report(comparisons=(), settings=_about(source, settings, choices))
    for case, own_source, own_settings in cases:
        done = report.comparisons
        bench = Bench(_inputs(own_source, own_settings), own_settings, run)
        for rows in all_rounds(bench, merges, case):
            comparison = Comparison(case=case, rows=rows)
            report = replace(report, comparisons=(*done, comparison))
            write(report, settings.out)
    return report


def write(report: Report, out: Path) -> None:
    """Write `cost.json`, `cost.md`, and a picture for every sweep where matplotlib is there."""
    text = json.dumps(report.to_json(), indent=2)
    (out / "cost.json").write_text(text + "\n", encoding="utf-8")
    plots = {f"{curves.name}.png": curves for curves in report.curves()} if plot.available() else {}
    for name, curves in plots.items():
        plot.draw(curves, out / name)
    (out / "cost.md").write_text(report.markdown(list(plots)), encoding="utf-8")


def all_rounds(
    bench: Bench, merges: Sequence[Merge], case: Mapping[str, int]
) -> Iterator[tuple[Row, ...]]:
    """The rows of one comparison, as they stand after every merge."""
    settings = bench.settings
    where = "".join(f"{name} {value}, " for name, value in case.items())
    rows = {merge.name: Row(name=merge.name, parameters=merge.shown) for merge in merges}
    if REPLAY in rows:
        _say(f"{where}a fit to replay, unmeasured")
        rows[REPLAY] = replace(rows[REPLAY], reason=fit_coefficients(bench))
    for index in range(max(settings.rounds, settings.fit_rounds)):
        for merge in merges:
            rounds = settings.fit_rounds if merge.point.fits else settings.rounds
            # `linear` runs in every round, or a fit of that round would have no ratio.
            if rows[merge.name].reason or (index >= rounds and merge.name != LINEAR):
                continue
            _say(f"{where}round {index + 1}: {merge.name}")
            row = one_more(rows[merge.name], merge, bench)
            _say(f"    {row.reason or _progress(row.rounds[-1])}")
            rows[merge.name] = row
            yield tuple(rows.values())


def one_more(row: Row, merge: Merge, bench: Bench) -> Row:
    """The row with one more round; what was merged is deleted."""
    measured, reason = _merged(merge.point, merge.name, bench)
    if reason:
        return replace(row, reason=reason)
    return replace(row, rounds=(*row.rounds, measured))


def fit_coefficients(bench: Bench) -> str:
    """Put coefficients in the place where `replay` finds them, or say why there are none."""
    target = bench.settings.out / "coefficients"
    settings = replace(bench.settings, sequence_length=min(32, bench.settings.sequence_length))
    _, reason = _merged(ANY_FIT, "fit", replace(bench, settings=settings), keep=target)
    return reason


def _merged(
    point: Point, name: str, bench: Bench, *, keep: Path | None = None
) -> tuple[Measured, str]:
    """Merge; returns the measurement, and the reason if it failed.

    Args:
        keep: folder to copy coefficients and corrections to; all else that was merged is deleted.
    """
    settings, models = bench.settings, bench.inputs.models
    folder = settings.out / "merged" / name
    shutil.rmtree(folder, ignore_errors=True)
    if settings.cold:
        page_cache.drop([*models.specialists.values(), *([models.base] if models.base else [])])
    log = settings.out / "logs" / f"{name}.log"
    measured = bench.run(_command(point, name, folder, bench), log)
    reason = failure(measured, log)
    if keep is not None and not reason:
        for file in (FILE_NAME, CORRECTIONS_NAME):  # the latter only where a tensor has one
            (keep / file).unlink(missing_ok=True)
            if (folder / file).is_file():
                shutil.copy(folder / file, keep)
    shutil.rmtree(folder, ignore_errors=True)
    return measured, reason


def _command(point: Point, name: str, folder: Path, bench: Bench) -> list[str]:
    """Write a merge's configuration, and return the command that runs it."""
    settings, models = bench.settings, bench.inputs.models
    entries = dict(models.specialists)
    if point.method == LINEAR and models.base is not None:
        entries[""] = models.base  # a name that no option can give
    text = configuration(
        point,
        entries,
        base=models.base,
        calibrations=bench.inputs.calibrations,
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        dtype=settings.dtype,
    )
    config = settings.out / "configs" / f"{name}.yaml"
    config.write_text(text, encoding="utf-8")
    size = settings.out_shard_size
    return merge_command(
        config,
        folder,
        device=settings.device,
        seed=settings.seed,
        options=["--out-shard-size", size] if size else [],
    )


def _inputs(source: Source, settings: Settings) -> Inputs:
    """The models to merge and their texts; made, where the source is a shape."""
    if isinstance(source, Shape):
        _say(f"Models: {', '.join(f'{name} {value}' for name, value in asdict(source).items())}")
        tokens = settings.samples * settings.sequence_length
        return synthetic.make(source, settings.out / "models", tokens=tokens)
    cache = settings.adapter_cache or settings.out / "adapters"
    return replace(source, models=resolve_all(source.models, cache))


def _require_calibrations(source: Source, merges: Sequence[Merge]) -> None:
    """Raise DamError if a row needs calibration text that no option names."""
    if isinstance(source, Shape):
        return
    missing = [name for name in source.models.specialists if name not in source.calibrations]
    needing = [merge.name for merge in merges if merge.name == REPLAY or merge.point.fits]
    if missing and needing:
        raise DamError(
            f"{', '.join(needing)} cannot run without calibration text of {', '.join(missing)}: "
            "pass --calibration NAME=PATH for each model, or --skip those rows"
        )


def _about(source: Source, settings: Settings, choices: Choices) -> dict[str, Any]:
    """Settings and surroundings, as JSON takes them."""
    if isinstance(source, Shape):
        models = {"synthetic models": ", ".join(f"{k} {v}" for k, v in asdict(source).items())}
    else:
        named = {f"model {name}": own for name, own in source.models.specialists.items()}
        models = {**({"base": source.models.base} if source.models.base else {}), **named}
    text = f"{settings.samples} sequences of {settings.sequence_length} tokens per model"
    return {
        "command": command_line(),
        **models,
        "calibration": text,
        "dtype": settings.dtype,
        "device": settings.device,
        "seed": settings.seed,
        "out shard size": settings.out_shard_size or "mergekit's default",
        "page cache": "dropped before every merge" if settings.cold else "left as it is",
        "dam variants": {name: dict(own) for name, own in choices.variants.items()},
        **machine(),
    }


def _progress(measured: Measured) -> str:
    """One line about a finished merge."""
    own = measured.own_peak_bytes
    without = f", {own / 1e9:.2f} GB without mapped files" if own else ""
    return f"{measured.seconds:.1f} s, {measured.peak_bytes / 1e9:.2f} GB{without}"


def _say(text: str) -> None:
    click.echo(text, err=True)
