"""Names of models on a command line: what cannot be a model is refused before anything is loaded.

Nothing slow is imported.
"""

import re
from pathlib import Path

from mergekit_dam.errors import DamError
from mergekit_dam.model.checkpoint import check_checkpoint
from mergekit_dam.untrusted import exists

REMEDY = "name a folder with config.json, safetensors and tokenizer files, or a model on the Hub"

_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")


def require_model(name: str, *, files: bool = True) -> None:
    """Refuse a name that is neither a folder with a model nor possibly an id on the Hub.

    An adapter may stand alone, or behind its base (BASE+ADAPTER).

    Args:
        name: The name.
        files: Whether a folder's files of weights are checked, too, which takes seconds.

    Raises:
        DamError: With the remedy; also if the folder's weights are missing or damaged.
    """
    path, there = Path(name), exists(name)
    if "+" in name and not there:
        for part in name.split("+"):
            require_model(part, files=files)
        return
    if there and path.is_dir() and (path / "adapter_config.json").is_file():
        return
    if there and path.is_dir() and (path / "config.json").is_file():
        if files:
            check_checkpoint(path)
        return
    if there and path.is_dir():
        problem = "is a folder without config.json"
    elif there:
        problem = "is a file"
    elif _ID.fullmatch(name):
        return
    else:
        problem = "does not exist"
    raise DamError(f"the model {name} {problem}: {REMEDY}")
