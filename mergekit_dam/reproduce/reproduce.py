"""A merge made again from its lock, and compared with it.

1. The lock is read, and coefficients beside it are checked.
2. Models are found by repository and commit, or by name and digests.
3. mergekit merges: a replay of the coefficients, or a whole new fit.
4. What came out is compared with the lock.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.calibration.sets import KEPT
from mergekit_dam.coefficients.file import CORRECTIONS_NAME, FILE_NAME
from mergekit_dam.digests import sha256_of
from mergekit_dam.errors import CalibrationError, DamError
from mergekit_dam.host import plugin
from mergekit_dam.host.names import naming
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.lock.schema import Lock, read_lock
from mergekit_dam.reproduce.compare import Difference, differences, measured
from mergekit_dam.reproduce.configuration import Texts, located, replay_of, tree_of, untracked
from mergekit_dam.reproduce.places import Places, found_models, origins

_CONFIGURATION = "mergekit_config.yml"
"""It has the paths that the user typed, or the parameter of the replay."""


@dataclass(frozen=True)
class Reproduction:
    """The result of a merge that was made again.

    Attributes:
        lock: The lock.
        refit: Whether the coefficients were fitted again.
        differences: What is not as in the lock.
        changed: What computed differently: version or machine -> (in the lock, now).
        seconds: Wall time of the merge and the comparison.
    """

    lock: Lock
    refit: bool
    differences: tuple[Difference, ...]
    changed: Mapping[str, tuple[str, str]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "byte_identical": not self.differences,
            "refit": self.refit,
            "tensors": len(self.lock.output.tensors),
            "differences": [difference.to_json() for difference in self.differences],
            "computed_with": {k: {"lock": a, "now": b} for k, (a, b) in self.changed.items()},
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        how = "fitted again" if self.refit else "replayed"
        count = len(self.lock.output.tensors)
        if not self.differences:
            return f"byte-identical: {count} tensors, {how} in {self.seconds:.1f} s"
        lines = [f"{how}: {len(self.differences)} differences from the lock:"]
        lines += [f"  - {difference}" for difference in self.differences]
        lines += [f"  {what}: {a} in the lock, {b} now" for what, (a, b) in self.changed.items()]
        return "\n".join(lines)


def reproduce(
    path: Path,
    *,
    to: Path | None = None,
    refit: bool = False,
    given: Sequence[str] = (),
    device: str | None = None,
    cache: str | None = None,
    quiet: bool = False,
) -> Reproduction:
    """Make a merge again.

    Args:
        path: A lock, or the folder that holds it.
        to: Where the model goes; None for a temporary folder, which is removed.
        refit: Whether to fit again, which needs the text; if not, coefficients are replayed.
        given: Folders in which models and texts are looked for, or `NAME=PATH`.
        device: Device to compute on; None for the kind that the merge had.
        cache: mergekit's `--transformers-cache`.
        quiet: Whether no progress is shown.

    Raises:
        DamError: The lock, a model, a text or the coefficients are not there, or are others.
    """
    started = time.perf_counter()
    plugin.install()  # so that mergekit takes all that may stand in a configuration of dam
    lock = read_lock(path)
    folder = (path if path.is_dir() else path.parent).resolve()
    _refuse(lock, path, folder, refit=refit)
    asked = _asked(lock, folder, Places.of(folder, given), refit=refit)
    options = _options(lock, device, cache, refit=refit, quiet=quiet)
    with ExitStack() as held:
        lasting = to is not None
        if to is None:
            to = Path(held.enter_context(tempfile.TemporaryDirectory())) / folder.name
        _merge(lock, asked, to, options, lasting=lasting)
        again = read_lock(to)
        found = differences(lock.output, again.output, files=_counted(lock, again, refit=refit))
        sized = [measured(difference, folder, to) for difference in found]
    every = (*_other_sources(lock, again), *sized)
    return Reproduction(lock, refit, every, _changed(lock, again), time.perf_counter() - started)


def _refuse(lock: Lock, path: Path, folder: Path, *, refit: bool) -> None:
    """Refuse a lock that cannot be followed."""
    if not refit:
        _check_coefficients(lock, folder)
    elif lock.replayed:
        raise DamError(
            f"{path}: the coefficients of this merge were replayed, not fitted; use --refit with "
            f"the lock of the merge that fitted them"
        )


@dataclass(frozen=True)
class _Asked:
    """A merge to be run.

    Attributes:
        tree: The configuration with the places of models and texts.
        kept: The same with the names of the lock, which stands beside the merged model.
        named: Place -> name.
    """

    tree: Mapping[str, Any]
    kept: Mapping[str, Any]
    named: Mapping[str, str]


def _asked(lock: Lock, folder: Path, places: Places, *, refit: bool) -> _Asked:
    models, texts = found_models(lock, places), Texts(lock, places)
    tree = untracked(located(lock, models, texts if refit else None))
    kept = untracked(tree_of(lock))
    named = {place: name for name, place in models.items()} | texts.named
    if refit:
        return _Asked(tree, kept, named)
    named[str(folder)] = folder.name
    return _Asked(replay_of(tree, folder), replay_of(kept, folder.name), named)


def _check_coefficients(lock: Lock, folder: Path) -> None:
    """Refuse coefficients that are not those of the lock."""
    for name in (FILE_NAME, CORRECTIONS_NAME):
        locked = lock.output.files.get(name)
        if locked is None:
            continue
        if not (folder / name).is_file():
            raise DamError(
                f"{folder / name}: a replay needs the coefficients of the merge beside its lock; "
                f"put them there, or fit again with --refit"
            )
        if sha256_of(folder / name) != locked:
            raise DamError(
                f"{folder / name}: not the file of the merge (its sha256 is another than in the "
                f"lock); take the intact one, or fit again with --refit"
            )


def _options(
    lock: Lock, device: str | None, cache: str | None, *, refit: bool, quiet: bool
) -> MergeOptions:
    if device is None:
        device = str(lock.computed_on.get("device", "cpu"))
        if device == "cuda" and not torch.cuda.is_available() and not refit:
            device = "cpu"
    return MergeOptions(**lock.options, device=device, transformers_cache=cache, quiet=quiet)


def _merge(lock: Lock, asked: _Asked, to: Path, options: MergeOptions, *, lasting: bool) -> None:
    """Run mergekit."""
    config = MergeConfiguration.model_validate(dict(asked.tree))
    text = yaml.safe_dump(dict(asked.kept), sort_keys=False, allow_unicode=True)
    with naming(None, asked.named):
        plugin.run_merge(
            config,
            str(to),
            options,
            text,
            approve=lambda own: _check_texts(lock, own),
            lasting=lasting,
        )


def _check_texts(lock: Lock, prepared: Prepared) -> None:
    """Refuse to fit to other tokens than those of the lock."""
    problems = []
    for model, own in prepared.calibration.items():
        name = prepared.names.of(model)
        locked = lock.calibration.get(name)
        if locked is None or own.provenance.sha256 != locked.sha256:
            was = "none" if locked is None else locked.sha256[:12]
            problems.append(
                f"calibration of {name}: the token ids have sha256 {own.provenance.sha256[:12]}, "
                f"in the lock {was}; required the text of the merge ({own.provenance.source})"
            )
    if problems:
        raise CalibrationError("\n".join(problems))


def _other_sources(lock: Lock, again: Lock) -> list[Difference]:
    """Files of models that were downloaded and are not those of the lock."""
    now = {origin.name: origin.files for origin in origins(again)}
    return [
        Difference("source", f"{origin.name}/{file}", "other content than in the lock")
        for origin in origins(lock)
        for file, locked in origin.files.items()
        if now.get(origin.name, {}).get(file) != locked
    ]


def _counted(lock: Lock, again: Lock, *, refit: bool) -> list[str]:
    """The files whose bytes have to be equal."""
    return [
        name
        for name in {*lock.output.files, *again.output.files}
        if name != _CONFIGURATION and (refit or not name.startswith(KEPT))
    ]


def _changed(lock: Lock, again: Lock) -> dict[str, tuple[str, str]]:
    was, now = ({**own.versions, **own.computed_on} for own in (lock, again))
    return {
        key: (str(was.get(key)), str(now.get(key)))
        for key in sorted({*was, *now})
        if was.get(key) != now.get(key)
    }
