"""One merge of a method's grid: the command that runs it, and its losses."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from examples.benchmarks.measuring.merges import Point, configuration, merge_command
from examples.benchmarks.measuring.processes import failure
from examples.benchmarks.merge_quality import regmean
from examples.benchmarks.merge_quality.documents import part_path
from examples.benchmarks.merge_quality.methods import REGMEAN
from examples.benchmarks.merge_quality.results import Losses, Trial
from examples.benchmarks.merge_quality.settings import Bench, Settings
from mergekit_dam.evaluation.whole import cross_entropy, load_model


def run_trial(point: Point, name: str, folder: Path, bench: Bench) -> Trial:
    """Merge one point into `folder`, and measure it on validation text."""
    log = bench.settings.out / "logs" / f"{name}.log"
    measured = bench.run(_command(point, name, folder, bench), log)
    reason = failure(measured, log)
    losses: Losses = {}
    if not reason:
        losses, reason = losses_of(folder, "validation", bench)
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
    evaluation = settings.evaluation
    loaded = load_model(model, evaluation)
    return {
        part: {
            domain: cross_entropy(loaded, text, batch_size=evaluation.batch_size)
            for domain, text in own.items()
        }
        for part, own in tokens.items()
    }


def losses_of(folder: Path, part: str, bench: Bench) -> tuple[Losses, str]:
    """Losses of a merged model; or no losses, and the reason."""
    try:
        losses = measure(str(folder), {part: bench.tokens[part]}, bench.settings)[part]
    except Exception as error:  # the method may have written anything, or nothing
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
