"""The backend that a configuration asks for. Its package is imported here, and only if it does."""

import importlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mergekit_dam import choices
from mergekit_dam.errors import ConfigError
from mergekit_dam.streams import progress
from mergekit_dam.tracking.backend import Backend
from mergekit_dam.tracking.tracker import Tracker


def require_tracker(name: choices.Tracking) -> None:
    """Refuse a backend whose package is not installed.

    Args:
        name: value of `tracking`, by which its package and the extra go, too.

    Raises:
        ConfigError: it says how to install it.
    """
    if name == "none":
        return
    try:
        importlib.import_module(name).__version__  # noqa: B018 (a folder `wandb` has none)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"parameters (top level): `tracking: {name}` required the package {name}, which cannot "
            f"be imported ({error}): pip install 'mergekit-dam[{name}]', or remove `tracking`"
        ) from error


@contextmanager
def tracking(
    name: choices.Tracking,
    configuration: Mapping[str, Any],
    texts: Sequence[str],
    *,
    place: Path,
    quiet: bool,
) -> Iterator[None]:
    """Track a merge while the body runs.

    Args:
        name: the value of `tracking`.
        configuration: what is merged, as plain values.
        texts: names of the models with text, in their order.
        place: folder for files, where the backend keeps any.
        quiet: whether the backend prints nothing.

    Raises:
        DamError: the backend cannot be opened.
    """
    if name == "none":
        yield
        return
    tracker = Tracker(_opened(name, configuration, place, quiet=quiet), texts)
    failed = True
    try:
        with progress.tracked_by(tracker):
            yield
        failed = False
    finally:
        tracker.close(failed=failed)


def _opened(name: str, configuration: Mapping[str, Any], place: Path, *, quiet: bool) -> Backend:
    if name == "wandb":
        from mergekit_dam.tracking.wandb import WeightsAndBiases

        return WeightsAndBiases(configuration, quiet=quiet)
    from mergekit_dam.tracking.tensorboard import TensorBoard

    progress.say(f"follow it: tensorboard --logdir {shlex.quote(str(place))}")
    return TensorBoard(place, yaml.safe_dump(dict(configuration), sort_keys=False))
