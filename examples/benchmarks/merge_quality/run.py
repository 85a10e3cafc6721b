"""A whole comparison, step by step.

1. Split the texts and write the parts; merge adapters into their base.
2. Measure the base and every specialist at home.
3. For every method: merge each point of its grid in a process of its own, measure it on validation
   text, keep the best; measure that one on test text.
4. After every row, write JSON and Markdown: what is finished stays if the run is stopped.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from examples.benchmarks.measuring.machine import machine
from examples.benchmarks.measuring.merges import Point, configuration, merge_command
from examples.benchmarks.measuring.models import Models, resolve_all
from examples.benchmarks.measuring.processes import Runner, failure, run_measured
from examples.benchmarks.measuring.tables import named
from examples.benchmarks.merge_quality import documents, regmean
from examples.benchmarks.merge_quality.documents import Shares, Sources, part_path
from examples.benchmarks.merge_quality.methods import REGMEAN, Choices, Method, select
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
from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.evaluate import EvaluationSettings, cross_entropy, load_model, read_tokens

JUDGED = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and places of a run.

    Attributes:
        out: folder of everything that is written.
        samples: calibration sequences per model.
        sequence_length: tokens per sequence, in calibration and in evaluation.
        sequences: of validation and of test text, per domain, at most.
        dtype: of what is merged, and written.
        device: where merges are computed and models are evaluated.
        keep: leave the chosen merges in `out`.
    """

    out: Path
    shares: Shares = field(default_factory=Shares)
    samples: int = 16
    sequence_length: int = 256
    sequences: Mapping[str, int] = field(default_factory=lambda: {"validation": 8, "test": 24})
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    adapter_cache: Path | None = None
    keep: bool = False


@dataclass(frozen=True)
class Bench:
    """What every step needs: the models, their texts as tokens, and the settings.

    Attributes:
        tokens: by part and domain, int64 `[sequences, sequence_length]`.
        run: how a merge is run.
    """

    models: Models
    tokens: Mapping[str, Mapping[str, torch.Tensor]]
    settings: Settings
    run: Runner


def compare(
    models: Models,
    sources: Mapping[str, Sources],
    settings: Settings,
    choices: Choices,
    *,
    run: Runner = run_measured,
) -> Report:
    """Run the comparison; the steps stand above.

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
    bench = Bench(models, _read_all(models, settings), settings, run)
    texts.append(_judged_on(bench))
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


def prepare_texts(models: Models, sources: Mapping[str, Sources], settings: Settings) -> list[str]:
    """Split and write the texts, see that they suffice, and say what they are."""
    tokenizer = AutoTokenizer.from_pretrained(models.any)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    parts, left_out = documents.make_parts(sources, settings.shares)
    folder = settings.out / "data"
    documents.write_parts(parts, folder)
    lines = documents.statement(documents.summarise(parts, left_out, count_tokens))
    vocab_size = _vocab_size(models)
    for domain, model in models.specialists.items():
        load_calibration(
            str(part_path(folder, domain, "calibration")),
            model=model,
            tokenizer=tokenizer,
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            vocab_size=vocab_size,
            seed=settings.seed,
        )
    return lines


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
    """The losses of models that are there before any merge: in each domain, the one named."""
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
    test, reason = _losses(best_folder, "test", bench)
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


def run_trial(point: Point, name: str, folder: Path, bench: Bench) -> Trial:
    """Merge one point into `folder`, and measure it on validation text."""
    log = bench.settings.out / "logs" / f"{name}.log"
    measured = bench.run(_command(point, name, folder, bench), log)
    reason = failure(measured, log)
    losses: Losses = {}
    if not reason:
        losses, reason = _losses(folder, "validation", bench)
    return Trial(
        parameters=point.shown,
        seconds=measured.seconds,
        peak_bytes=measured.peak_bytes,
        validation=losses,
        reason=reason,
    )


def measure(
    model: str, tokens: Mapping[str, Mapping[str, torch.Tensor]], settings: Settings
) -> dict[str, dict[str, float]]:
    """Cross-entropy of a model, loaded once: by part and domain, as the tokens are."""
    evaluation = _evaluation(settings)
    loaded = load_model(model, evaluation)
    return {
        part: {
            domain: cross_entropy(loaded, text, batch_size=evaluation.batch_size)
            for domain, text in own.items()
        }
        for part, own in tokens.items()
    }


def _losses(folder: Path, part: str, bench: Bench) -> tuple[Losses, str]:
    """Losses of a merged model, or none and the reason."""
    try:
        losses = measure(str(folder), {part: bench.tokens[part]}, bench.settings)[part]
    except Exception as error:  # whatever a method left there that is no model
        return {}, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not all(map(math.isfinite, losses.values())):
        return {}, f"its losses on {part} text are not finite"
    return losses, ""


def _command(point: Point, name: str, folder: Path, bench: Bench) -> list[str]:
    """Write what a merge needs, and return the command that runs it."""
    settings, specialists = bench.settings, bench.models.specialists
    config = settings.out / "configs" / f"{name}.yaml"
    data = settings.out / "data"
    calibrations = {d: str(part_path(data, d, "calibration").absolute()) for d in specialists}
    if point.method == REGMEAN:
        regmean.Job(
            models=tuple(specialists.values()),
            calibrations=tuple(calibrations.values()),
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            alpha=point.parameters["alpha"],
            device=settings.device,
            dtype=settings.dtype,
        ).save(config)  # JSON is YAML
        return [sys.executable, regmean.__file__, str(config), str(folder)]
    text = configuration(
        point,
        specialists,
        base=bench.models.base,
        calibrations=calibrations,
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        dtype=settings.dtype,
    )
    config.write_text(text, encoding="utf-8")
    return merge_command(config, folder, device=settings.device, seed=settings.seed)


def _read_all(models: Models, settings: Settings) -> dict[str, dict[str, torch.Tensor]]:
    """Validation and test text as tokens, which are the same for all models."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(models.any)
    return {
        part: {
            domain: read_tokens(
                part_path(settings.out / "data", domain, part),
                tokenizer,
                replace(_evaluation(settings), sequences=settings.sequences[part]),
                vocab_size=_vocab_size(models),
            )
            for domain in models.specialists
        }
        for part in JUDGED
    }


def _evaluation(settings: Settings) -> EvaluationSettings:
    return EvaluationSettings(sequence_length=settings.sequence_length, device=settings.device)


def _vocab_size(models: Models) -> int:
    return int(AutoConfig.from_pretrained(models.any).get_text_config().vocab_size)


def _judged_on(bench: Bench) -> str:
    counts = (
        f"{part} " + ", ".join(f"{domain} {len(own)}" for domain, own in bench.tokens[part].items())
        for part in JUDGED
    )
    length = bench.settings.sequence_length
    return f"Sequences of {length} tokens that losses are measured on: {'; '.join(counts)}."


def _about(models: Models, settings: Settings, choices: Choices) -> dict[str, Any]:
    """Settings and surroundings, as JSON takes them."""
    return {
        "command": " ".join(sys.argv),
        "base": models.base,
        **{f"model {domain}": model for domain, model in models.specialists.items()},
        "calibration": f"{settings.samples} sequences of {settings.sequence_length} tokens a model",
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
