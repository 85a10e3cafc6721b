"""The command `evaluate`."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_dam.command_line import (
    Command,
    device_options,
    json_option,
    print_json,
    resolved_device,
    terminal_width,
)

if TYPE_CHECKING:
    from mergekit_dam.calibration.source import CalibrationSource
    from mergekit_dam.evaluation.conditions import Condition
    from mergekit_dam.evaluation.evaluation import Evaluation
    from mergekit_dam.evaluation.settings import EvaluationSettings

_LINEAR = "linear"
_EXAMPLE = """
mergekit-dam evaluate ./out org/math org/german \\
    --data math=test/math.jsonl --data test/german.jsonl
mergekit-dam evaluate ./out --data german=x.jsonl \\
    --reference german=org/german --baseline linear \\
    --fail-if 'recovery german < 0.8'
"""


def _positive(least: int = 1) -> click.IntRange:
    return click.IntRange(min=least)


@click.command(
    "evaluate",
    cls=Command,
    example=_EXAMPLE,
    exit_codes={1: "refused or failed, or a --fail-if holds; stderr says why"},
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    "texts",
    metavar="[NAME=]TEXT",
    multiple=True,
    help="Held-out text, as `calibration` takes it, options too. Repeat for more texts.",
)
@click.option(
    "--baseline",
    metavar="MODEL",
    help="Compare with this model, or with the plain average (linear) of the references, else of "
    "the models that MODEL was merged from; or of those of a YAML file.",
)
@click.option(
    "--reference",
    "references",
    metavar="NAME=MODEL",
    multiple=True,
    help="Specialist of the text NAME: shows how much of its advantage over the average is kept.",
)
@click.option(
    "--fail-if",
    "conditions",
    metavar="CONDITION",
    multiple=True,
    help="Exit with 1 if this holds for a MODEL: 'german > 3.1', 'recovery mean < 0.8'.",
)
@click.option("--tasks", metavar="A,B", help="Run these benchmarks of lm-eval, too.")
@click.option(
    "--sequence-length", default=256, show_default=True, type=_positive(2), help="In tokens."
)
@click.option(
    "--sequences", default=24, show_default=True, type=_positive(), help="Per text, at most."
)
@click.option(
    "--batch-size", default=4, show_default=True, type=_positive(), help="Sequences at once."
)
@device_options(default="auto")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    metavar="DTYPE",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="float32, bfloat16, float16, or auto for the stored one.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model.")
@json_option
def evaluate(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare models by their loss on held-out text.

    Losses are in nats per token, with standard errors. Every MODEL (a folder, an id on the
    Hub, or BASE+ADAPTER; NAME=MODEL names it) reads the same sequences, and one block of it is
    in memory at a time.
    """
    request = _checked(models, options)
    from mergekit_dam.evaluation import tables

    found = _measured(request)
    tasks = _tasks(request)
    failed = [said for own in request.conditions for said in own.failures(found)] if found else []
    if as_json:
        losses = tables.to_json(found) if found else {}
        print_json({**losses, **({"tasks": tasks} if tasks else {}), "failed": failed})
    else:
        if found:
            click.echo(tables.tables(found, terminal_width()))
        if tasks:
            from mergekit_dam.evaluation.tasks import tasks_table

            click.echo(("\n" if found else "") + tasks_table(tasks, terminal_width()))
    for said in failed:
        click.secho(f"failed: {said}", fg="red", err=True)
    if failed:
        raise click.exceptions.Exit(1)


@dataclass(frozen=True)
class _Request:
    """What is asked for, checked as far as it can be without slow imports."""

    models: Mapping[str, str]
    texts: "Mapping[str, CalibrationSource]"
    baseline: str | None
    references: Mapping[str, str]
    conditions: "Sequence[Condition]"
    tasks: Sequence[str]
    settings: "EvaluationSettings"


def _checked(models: tuple[str, ...], options: Mapping[str, Any]) -> _Request:
    from mergekit_dam.evaluation.conditions import Condition
    from mergekit_dam.evaluation.named import named_models, named_texts
    from mergekit_dam.evaluation.settings import EvaluationSettings
    from mergekit_dam.evaluation.tasks import require_lm_eval
    from mergekit_dam.model.named import require_model

    if not options["texts"] and not options["tasks"]:
        raise click.UsageError("Missing option '--data' (or '--tasks').")
    for name in models:
        if name == "-" or name.endswith(".json"):
            raise click.UsageError(f"--json prints on stdout: write `--json > FILE`, not {name}")
    texts = named_texts(options["texts"])
    references = _references(options["references"], texts)
    baseline = options["baseline"] or (_LINEAR if references else None)
    is_model = baseline is not None and not _is_average(baseline)
    named = named_models(models, reserved=_LINEAR if _is_average(baseline) else None)
    for model in (*named.values(), *references.values(), *([baseline] if is_model else [])):
        require_model(str(model), files=False)
    conditions = [Condition.parse(text) for text in options["conditions"]]
    for condition in conditions:
        condition.check(texts, references, compared=baseline is not None)
    tasks = [task.strip() for task in (options["tasks"] or "").split(",") if task.strip()]
    if tasks:
        require_lm_eval()
    shared = ("sequence_length", "sequences", "batch_size", "dtype", "trust_remote_code")
    settings = EvaluationSettings(
        device=resolved_device(options["device"]), **{name: options[name] for name in shared}
    )
    return _Request(named, texts, baseline, references, conditions, tasks, settings)


def _references(given: Sequence[str], texts: Mapping[str, Any]) -> dict[str, str]:
    from mergekit_dam.evaluation.named import split_name

    found: dict[str, str] = {}
    for text in given:
        name, model = split_name(text)
        if name is None:
            raise click.BadParameter(
                f"required NAME=MODEL, a text and its specialist, got {text}",
                param_hint="--reference",
            )
        if name not in texts:
            raise click.BadParameter(
                f"there is no text {name!r} among {', '.join(texts)}", param_hint="--reference"
            )
        if found.setdefault(name, model) != model:
            raise click.BadParameter(
                f"two specialists of the text {name!r}: {found[name]} and {model}",
                param_hint="--reference",
            )
    return found


def _is_average(baseline: str | None) -> bool:
    """Whether a baseline is made on the spot."""
    return baseline == _LINEAR or Path(baseline or "").suffix in (".yaml", ".yml")


def _measured(request: _Request) -> "Evaluation | None":
    """Losses of all models, and of the baseline, which may have to be made."""
    if not request.texts:
        return None
    from mergekit_dam.evaluation.evaluation import evaluate as run

    models, baseline = dict(request.models), request.baseline
    with contextlib.ExitStack() as stack:
        if _is_average(baseline):
            models[_LINEAR] = stack.enter_context(_average(request))
            baseline = _LINEAR
        elif baseline is not None:
            known = [name for name, model in models.items() if baseline in (name, model)]
            baseline = known[0] if known else models.setdefault(baseline, baseline)
        return run(
            models,
            request.texts,
            request.settings,
            baseline=baseline,
            references=request.references,
            say=lambda line: click.echo(line, err=True),
        )


def _average(request: _Request) -> "contextlib.AbstractContextManager[str]":
    from mergekit_dam.evaluation import average

    models = list(dict.fromkeys(request.references.values()))
    written = [Path(model) / average.WRITTEN for model in request.models.values()]
    merged = [file for file in written if file.is_file()]
    if request.baseline != _LINEAR:
        configuration = average.of_configuration(Path(str(request.baseline)))
    elif len(models) > 1:
        configuration = average.of_models(models)
    elif merged:
        configuration = average.of_configuration(merged[0])
    else:
        raise click.UsageError(
            f"--baseline linear: required the models to average: two --reference, a MODEL that "
            f"mergekit merged (with {average.WRITTEN}), or a YAML file in place of `linear`"
        )
    every = configuration.get("models") or ()
    told = ", ".join(str(own.get("model")) for own in every if isinstance(own, Mapping))
    click.echo(f"linear is the average of {told or 'the models'}", err=True)
    settings = request.settings
    return average.average_made(
        configuration, device=settings.device, trust_remote_code=settings.trust_remote_code
    )


def _tasks(request: _Request) -> dict[str, Any]:
    if not request.tasks:
        return {}
    from mergekit_dam.evaluation.sources import judged_models
    from mergekit_dam.evaluation.tasks import run_tasks

    settings = request.settings
    with judged_models(request.models.values(), settings.trust_remote_code) as judged:
        return run_tasks(
            {name: judged[model].folder() for name, model in request.models.items()},
            request.tasks,
            device=settings.device,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            trust_remote_code=settings.trust_remote_code,
        )
