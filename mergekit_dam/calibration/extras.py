"""Libraries that only some sources need, imported when such a source is read."""

import importlib
from typing import Any

from mergekit_dam.errors import CalibrationError


def require(module: str, *, needed_for: str) -> Any:
    """Import and return `module`.

    Raises CalibrationError, with the command that installs it, where it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CalibrationError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which cannot be "
            f"imported ({error}): pip install 'mergekit-dam[data]'"
        ) from error
