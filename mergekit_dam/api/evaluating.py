"""`evaluate`."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.api.texts import Text, documents_of, written
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.command_line import resolved_device
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.evaluation import Evaluation
from mergekit_dam.evaluation.evaluation import evaluate as run
from mergekit_dam.evaluation.named import text_source
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.model.named import require_model

Model = str | os.PathLike[str]


def evaluate(
    models: Model | Sequence[Model] | Mapping[str, Model],
    texts: Mapping[str, Text],
    *,
    baseline: Model | None = None,
    references: Mapping[str, Model] | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Evaluation:
    """Measure the loss of models on held-out text, one block of a model in memory at a time.

    Args:
        models: Folders, ids on the Hub or BASE+ADAPTER; names for them with a mapping.
        texts: Text's name -> a path or dataset, or a list of documents in memory.
        baseline: The model that others are compared with, one of `models`.
        references: Text's name -> the specialist of that text.
        device: Where to compute: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        settings: `sequence_length` (256), `sequences` per text at most (24), `batch_size` (4),
            `dtype` (`float32`), `trust_remote_code`.

    Returns:
        The evaluation: among others `losses`, model -> text -> nats per token; `loss(model)` with
        standard errors; `difference(model)` from the baseline, `recovery(model)`.

    Raises:
        DamError: A model or text is missing, cannot be read or is too short.

    >>> import mergekit_dam
    >>> texts = {"math": ["one plus two is three"] * 20}
    >>> found = mergekit_dam.evaluate(["models/math"], texts, sequence_length=16)
    >>> found.losses["models/math"]["math"] > 0
    True
    """
    named = _named(models)
    if not texts:
        raise DamError("texts: required at least one, got none")
    against = None if baseline is None else os.fspath(baseline)
    if against is not None and against not in named:
        raise DamError(f"baseline: required one of {', '.join(named)}, got {against}")
    specialists = {text: os.fspath(model) for text, model in (references or {}).items()}
    unknown = [text for text in specialists if text not in texts]
    if unknown:
        raise DamError(f"references: there is no text {unknown[0]!r} among {', '.join(texts)}")
    if specialists and against is None:
        raise DamError(
            "references: recovery is counted from a `baseline`, which was not given; name one, "
            "usually the plain average of the models"
        )
    for model in (*named.values(), *(m for m in specialists.values() if m not in named)):
        require_model(model, files=False)
    with tempfile.TemporaryDirectory(prefix="mergekit-dam-") as scratch:
        sources: dict[str, CalibrationSource] = {}
        shown: dict[str, str] = {}
        for name, text in texts.items():
            documents = documents_of(text, name)
            place = str(text)
            if documents is not None:
                place = str(written(documents, Path(scratch) / f"{len(sources)}.jsonl"))
            sources[name] = text_source(place)
            shown[name] = place if documents is None else f"{len(documents)} documents in memory"
        found = run(
            named, sources, _settings(device, settings), baseline=against, references=specialists
        )
    return dataclasses.replace(found, texts=shown)


def _named(models: Any) -> dict[str, str]:
    """Name -> model."""
    if isinstance(models, Mapping):
        found = {str(name): os.fspath(model) for name, model in models.items()}
    elif isinstance(models, (str, os.PathLike)):
        found = {os.fspath(models): os.fspath(models)}
    else:
        found = {os.fspath(model): os.fspath(model) for model in models}
    if not found:
        raise DamError("models: required at least one, got none")
    return found


def _settings(device: str, given: Mapping[str, Any]) -> EvaluationSettings:
    known = {field.name for field in dataclasses.fields(EvaluationSettings)} - {"device"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise DamError(f"no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return EvaluationSettings(device=resolved_device(device), **given)
