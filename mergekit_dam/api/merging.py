"""`merge` and `plan`."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_dam.api.asked import Configuration, asked, merge_options
from mergekit_dam.api.texts import Text
from mergekit_dam.errors import DamError
from mergekit_dam.estimate.estimate import Estimate, plan_of
from mergekit_dam.estimate.gpus import GPUS
from mergekit_dam.host import plugin
from mergekit_dam.host.compat import LoaderCache
from mergekit_dam.host.names import naming


def merge(
    configuration: Configuration,
    out: str | os.PathLike[str],
    *,
    texts: Mapping[str, Text] | None = None,
    device: str = "cpu",
    quiet: bool = True,
    **options: Any,
) -> Path:
    """Merge models, as `mergekit-yaml` does.

    Args:
        configuration: A configuration with `merge_method: dam`: the path of a YAML file, its
            content as a dictionary (models may be paths), or a `MergeConfiguration`.
        out: Folder of the merged model.
        texts: Model, by its name in the configuration or the last part of that -> its calibration
            text: a path or dataset as `calibration` takes it, or a list of documents in memory,
            which are kept in a temporary folder while models are merged.
        device: Where to compute: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU if there is one.
        quiet: Whether no progress is shown.
        options: Further options of mergekit's `MergeOptions`, such as `trust_remote_code`.

    Returns:
        The folder of the merged model.

    Raises:
        DamError: A configuration, text, model or option is refused, or the merge fails.

    >>> import mergekit_dam
    >>> configuration = {
    ...     "merge_method": "dam",
    ...     "models": [{"model": "models/math"}, {"model": "models/animals"}],
    ...     "parameters": {"samples": 4, "sequence_length": 16, "objective": "layer"},
    ... }
    >>> texts = {"math": ["one plus two is three"] * 20, "animals": ["the old fish swims"] * 20}
    >>> out = mergekit_dam.merge(configuration, "merged", texts=texts)
    >>> (out / "model.safetensors").is_file()
    True
    """
    own = merge_options(device, {**options, "quiet": quiet})
    with tempfile.TemporaryDirectory(prefix="mergekit-dam-") as scratch:
        request = asked(configuration, texts, Path(scratch).resolve())
        LoaderCache.loaders.clear()  # a model may have changed since an earlier merge
        with naming(request.folder, request.named):
            plugin.run_merge(request.config, os.fspath(out), own, request.text)
    return Path(out)


def plan(
    configuration: Configuration,
    out: str | os.PathLike[str] | None = None,
    *,
    texts: Mapping[str, Text] | None = None,
    device: str = "cpu",
    gpu: str | None = None,
    **options: Any,
) -> Estimate:
    """Estimate what a merge costs; no weight and no text is read.

    Args:
        configuration: As for `merge`.
        out: Where the merged model would go; nothing is written there. None is a place on the
            disk of the current folder.
        texts: As for `merge`.
        device: Where the merge would compute, on this machine.
        gpu: A GPU that need not be here, such as `h100`, in the place of `device`.
        options: As for `merge`.

    Returns:
        The estimate: among others `least_seconds` and `most_seconds`, `resident_bytes` (peak on
        the host), and `problems`, sentences about what would not fit.

    Raises:
        DamError: The merge would be refused, or there is no such GPU.

    >>> import mergekit_dam
    >>> found = mergekit_dam.plan("dam.yaml", gpu="h100")
    >>> found.problems
    ()
    >>> found.least_seconds <= found.most_seconds
    True
    """
    if gpu is not None and gpu not in GPUS:
        raise DamError(f"gpu: required one of {', '.join(sorted(GPUS))}, got {gpu!r}")
    own = merge_options(device, {**options, "quiet": True})
    with tempfile.TemporaryDirectory(prefix="mergekit-dam-") as scratch:
        request = asked(configuration, texts, Path(scratch).resolve())
        chosen = None if gpu is None else GPUS[gpu]
        place = None if out is None else Path(out)
        return plan_of(request.config, request.document, place, own, chosen)
