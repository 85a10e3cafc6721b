"""What the model card asks of mergekit's references to models."""

from collections.abc import Iterable, Iterator

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from mergekit.common import ModelReference

from mergekit_dam.untrusted import exists


def hub_ids(models: Iterable[ModelReference]) -> list[str]:
    """Ids of models and adapters that are on the Hub, in order; a local folder has none."""
    return [path for path in _paths(models) if is_hub_id(path)]


def is_hub_id(path: str) -> bool:
    """Whether a path is no local one, and can be the id of a repository."""
    if exists(path) or path.startswith((".", "~")):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _paths(models: Iterable[ModelReference]) -> Iterator[str]:
    for model in models:
        yield model.model.path
        if model.lora is not None:
            yield model.lora.path
