"""What others wrote or typed: JSON of any content, and texts that may be names of files.

Nothing slow is imported.
"""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any


def expanded(path: str | Path) -> Path:
    """A path with `~` as the home of a user; one of a user that is not known stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path's own raises for unknown users)


def exists(path: str | Path) -> bool:
    """Whether there is something by a name, which may be any text."""
    try:
        return expanded(path).exists()
    except (OSError, ValueError):  # too long, a NUL byte
        return False


def parsed_json(text: str | bytes) -> Any:
    """The values of a JSON text that anybody may have written.

    Raises:
        ValueError: It is no JSON in UTF-8, is nested too deeply, or has a number or a text that
            JSON does not know (NaN, infinity, half of a character).
    """
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def stays_inside(name: str) -> bool:
    """Whether a name, seen from a folder, means a file in it or in a folder in it."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\0" not in name
