"""A whole comparison, step by step.

1. Split the texts and write the parts; merge adapters into their base.
2. Measure the base on all texts, and every specialist on its own.
3. For every method: merge each point of its grid in a process of its own, measure it on validation
   text, keep the best; measure that one on test text.
4. After every row, write JSON and Markdown: a run that is stopped keeps what it has finished.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from examples.benchmarks.measuring.machine import command_line, machine
from examples.benchmarks.measuring.models import Models, resolve_all
from examples.benchmarks.measuring.processes import Runner, run_measured
from examples.benchmarks.measuring.tables import named
from examples.benchmarks.merge_quality.documents import Sources
from examples.benchmarks.merge_quality.methods import Choices, Method, select
from examples.benchmarks.merge_quality.results import (
    BASE,
    LINEAR,
    OWN,
    Losses,
    Report,
    Row,
    Trial,
    best,
    mean,
    recovery,
)
from examples.benchmarks.merge_quality.settings import JUDGED, Bench, Settings
from examples.benchmarks.merge_quality.texts import count_sequences, prepare_texts, tokens_by_part
from examples.benchmarks.merge_quality.trials import losses_of, measure, run_trial


def compare(
    models: Models,
    sources: Mapping[str, Sources],
    settings: Settings,
    choices: Choices,
    *,
    run: Runner = run_measured,
) -> Report:
    """Run the comparison; the steps are listed above.

    Raises:
        DamError: if models or texts cannot be used. A merge that fails is a row instead.
        KeyboardInterrupt: as it comes; finished rows are written by then.
    """
    methods = select(
        choices,
        count=len(models.specialists),
        has_base=models.base is not None,
        samples=settings.samples,
    )
    for folder in ("configs", "logs", "merged"):
        (settings.out / folder).mkdir(parents=True, exist_ok=True)
    models = resolve_all(models, settings.adapter_cache or settings.out / "adapters")
    texts = prepare_texts(models, sources, settings)
    bench = Bench(models, tokens_by_part(models, settings), settings, run)
    texts.append(count_sequences(bench.tokens, settings))
    for line in texts:
        _say(line)
    report = Report(
        domains=tuple(models.specialists),
        rows=(),
        texts=tuple(texts),
        settings=_about(models, settings, choices),
    )
    for row in all_rows(bench, methods):
        report = replace(report, rows=(*report.rows, row))
        write(report, settings.out)
    return report


def write(report: Report, out: Path) -> None:
    """Write `quality.json` and `quality.md`."""
    text = json.dumps(_finite(report.to_json()), indent=2)
    (out / "quality.json").write_text(text + "\n", encoding="utf-8")
    (out / "quality.md").write_text(report.markdown(), encoding="utf-8")


def all_rows(bench: Bench, methods: Sequence[Method]) -> Iterator[Row]:
    """Every row of the table, one by one, as it is finished."""
    specialists, base = bench.models.specialists, bench.models.base
    if base is not None:
        yield row_of_models(BASE, dict.fromkeys(specialists, base), bench)
    own = row_of_models(OWN, specialists, bench)
    yield own
    linear: Losses = {}
    for number, method in enumerate(methods, 1):
        _say(f"[{number}/{len(methods)}] {method.name}")
        row = row_of_method(method, bench, linear=linear, own=own.validation)
        if method.name == LINEAR:
            linear = row.validation
        if row.reason:
            _say(f"    failed: {row.reason}")
        yield row


def row_of_models(name: str, models: Mapping[str, str], bench: Bench) -> Row:
    """The losses of models before any merge.

    Args:
        models: by domain, the model that is measured there.
    """
    losses: dict[str, dict[str, float]] = {part: {} for part in JUDGED}
    for model in dict.fromkeys(models.values()):
        _say(f"{name}: {model}")
        own = {
            part: {d: tokens for d, tokens in bench.tokens[part].items() if models[d] == model}
            for part in JUDGED
        }
        for part, found in measure(model, own, bench.settings).items():
            losses[part] |= found
    return Row(name=name, test=losses["test"], validation=losses["validation"])


def row_of_method(method: Method, bench: Bench, *, linear: Losses, own: Losses) -> Row:
    """Run a method's grid, and measure its best point on test text.

    Args:
        linear, own: losses of the plain average and of the specialists, on validation text.
    """
    folder = bench.settings.out / "merged" / f"{method.name}.trial"
    best_folder = folder.with_name(method.name)
    trials: list[Trial] = []
    for index, point in enumerate(method.points):
        _remove(folder)
        trial = run_trial(point, f"{method.name}-{index + 1}", folder, bench)
        trials.append(trial)
        _say(f"    {index + 1} of {len(method.points)}: {_progress(trial, linear, own)}")
        if best(trials, linear=linear, own=own) is trial:
            _remove(best_folder)
            folder.rename(best_folder)
    _remove(folder)
    chosen = best(trials, linear=linear, own=own)
    if chosen is None:
        return Row(name=method.name, trials=tuple(trials), reason=trials[0].reason)
    test, reason = losses_of(best_folder, "test", bench)
    if not bench.settings.keep:
        _remove(best_folder)
    return Row(
        name=method.name,
        test=test,
        validation=chosen.validation,
        trials=tuple(trials),
        chosen=chosen,
        reason=reason,
    )


def _about(models: Models, settings: Settings, choices: Choices) -> dict[str, Any]:
    """Settings and surroundings, as JSON takes them."""
    text = f"{settings.samples} sequences of {settings.sequence_length} tokens per model"
    return {
        "command": command_line(),
        "base": models.base,
        **{f"model {domain}": model for domain, model in models.specialists.items()},
        "calibration": text,
        "dtype": settings.dtype,
        "device": settings.device,
        "seed": settings.seed,
        "shares of a split file": asdict(settings.shares),
        "dam variants": {name: dict(own) for name, own in choices.variants.items()},
        **machine(),
    }


def _progress(trial: Trial, linear: Losses, own: Losses) -> str:
    """One line about a finished merge."""
    shown = named(trial.parameters)
    cost = f"{trial.seconds:.1f} s, {(trial.peak_bytes or 0) / 1e9:.2f} GB"
    if trial.reason:
        return f"{shown}  {cost}  {trial.reason}"
    share = mean(recovery(trial.validation, linear=linear, own=own)) if linear else None
    return f"{shown}  {cost}" + ("" if share is None else f"  validation recovery {share:.3f}")


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    click.echo(text, err=True)
