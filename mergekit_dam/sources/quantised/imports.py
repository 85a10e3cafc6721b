"""Libraries that read a format; optional, and imported where a checkpoint has the format."""

import importlib
from typing import Any

from mergekit_dam.errors import ArchitectureError


def required(module: str, *, form: str) -> Any:
    """Import and return a module of a library.

    Args:
        module: the module; its first part is the library, and with dashes the extra of its name.
        form: the format that it reads, in words.

    Raises:
        ArchitectureError: it cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: of a shared library
        package = module.partition(".")[0].replace("_", "-")
        raise ArchitectureError(
            f"quantised weights ({form}) required the package {package}, which cannot be imported "
            f"({error}): pip install 'mergekit-dam[{package}]', or merge the model that it was "
            f"quantised from"
        ) from error
