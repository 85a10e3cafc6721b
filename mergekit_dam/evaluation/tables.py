"""An evaluation as tables for people, and as JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergekit_dam.evaluation.evaluation import Evaluation
from mergekit_dam.evaluation.losses import Measured
from mergekit_dam.tables import aligned

Numbers = Mapping[str, Measured | None]


def format_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Lay out losses for a terminal: names on the left, numbers with three decimals aligned."""
    return aligned(header, [[name, *map(_number, row)] for name, row in rows])


def tables(result: Evaluation, width: int | None = None) -> str:
    """Loss and perplexity of every model; then differences and recovery, where asked for.

    Args:
        result: The evaluation.
        width: Columns of the terminal.
    """
    names = short_names((*result.models, *([result.baseline] if result.baseline else [])))
    losses = {model: result.loss(model) for model in names}
    parts = [_table("nats per token", losses, names, width)]
    specialists = {text: result.losses[m][text] for text, m in result.references.items()}
    perplexities = {
        model: {text: None if own is None else own.perplexity for text, own in found.items()}
        for model, found in losses.items()
    }
    parts.append(_table("perplexity", perplexities, names, width))
    if result.baseline is not None:
        others = {model: name for model, name in names.items() if model != result.baseline}
        found = {model: result.difference(model) for model in others}
        if others:
            parts.append(_table(f"minus {names[result.baseline]}", found, others, width))
    if specialists:
        found = {model: result.recovery(model) for model in names if model != result.baseline}
        parts.append(_table("recovery", found, names, width))
        said = ", ".join(f"{loss:.3f} on {text}" for text, loss in specialists.items())
        parts.append(f"specialists, nats per token: {said}")
    return "\n\n".join(parts)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Model -> the last part of its path, or the whole of it where that is not unique."""
    every = list(dict.fromkeys(models))
    last = [Path(model).name or model for model in every]
    pairs = zip(every, last, strict=True)
    return {model: own if last.count(own) == 1 else model for model, own in pairs}


def to_json(result: Evaluation) -> dict[str, Any]:
    """Everything, as values that can be written as JSON; what is not known is null."""
    every = dict.fromkeys((*result.models, *([result.baseline] if result.baseline else [])))
    return {
        "settings": asdict(result.settings),
        "texts": dict(result.texts),
        "baseline": result.baseline,
        "references": dict(result.references),
        "reference_loss": {
            text: result.losses[model][text] for text, model in result.references.items()
        },
        "models": [_model(result, model) for model in every],
    }


def _model(result: Evaluation, model: str) -> dict[str, Any]:
    loss = result.loss(model)
    perplexity = {t: None if m is None else m.perplexity for t, m in loss.items()}
    entry: dict[str, Any] = {
        "model": model,
        **_columns("loss", loss),
        **_columns("perplexity", perplexity),
        "sequences": result.sequences[model],
    }
    if result.baseline is not None:
        entry |= _columns("difference", result.difference(model))
        if result.references:
            entry |= _columns("recovery", result.recovery(model))
    entry["mean"] = entry["loss"].pop("mean")
    entry["mean_error"] = entry["loss_error"].pop("mean")
    return entry


def _columns(name: str, numbers: Numbers) -> dict[str, Any]:
    """A number and its standard error for every text, and for the mean."""
    values = {text: None if own is None else own.value for text, own in numbers.items()}
    errors = {text: None if own is None else own.error for text, own in numbers.items()}
    return {name: values, f"{name}_error": errors}


def _table(
    title: str, found: Mapping[str, Numbers], names: Mapping[str, str], width: int | None
) -> str:
    columns = next(iter(found.values()), {})
    rows = [[names[model], *map(_cell, own.values())] for model, own in found.items()]
    return aligned([title, *columns], rows, width)


def _cell(own: Measured | None) -> str:
    if own is None:
        return "-"
    return _number(own.value) + ("" if own.error is None else f" ±{own.error:.3f}")


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # -0.0 + 0.0 is 0.0, so that no -0.000 is printed
