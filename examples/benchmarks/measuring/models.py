"""The models that are merged, as folders; an adapter is merged into its base once, beforehand."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from transformers import AutoTokenizer

from mergekit_dam.errors import DamError


@dataclass(frozen=True)
class Models:
    """The models to merge, as paths of folders or Hub ids.

    Attributes:
        specialists: by domain, in the order in which they are merged.
        base: their base model, for the methods that take one.
    """

    specialists: dict[str, str]
    base: str | None = None

    @property
    def any(self) -> str:
        """One of them, to take tokenizer and vocabulary from."""
        return self.base or next(iter(self.specialists.values()))


def resolve(name: str, cache: Path) -> str:
    """A model that every program here can load by its name.

    A folder becomes an absolute path, or mergekit would ask the Hub about `a/b`;
    `BASE+ADAPTER` is merged by mergekit, in float32, and gets the base's tokenizer.

    Args:
        cache: where merged adapters are, or are put.

    Raises:
        DamError: if mergekit does not understand the name, or cannot merge the adapter.
    """
    parts = [
        str(Path(part).absolute()) if Path(part).is_dir() else part for part in name.split("+")
    ]
    if len(parts) == 1:
        return parts[0]
    try:
        return _merged(ModelReference.parse("+".join(parts)), cache)
    except Exception as error:  # of peft, transformers, the Hub or pydantic
        reason = str(error).strip().partition("\n")[0]
        raise DamError(f"the adapter of {name} cannot be merged: {reason}") from error


def resolve_all(models: Models, cache: Path) -> Models:
    """The same models by names that `resolve` gives."""
    return Models(
        {domain: resolve(name, cache) for domain, name in models.specialists.items()},
        None if models.base is None else resolve(models.base, cache),
    )


def _merged(reference: ModelReference, cache: Path) -> str:
    before = set(cache.iterdir()) if cache.is_dir() else set()
    try:
        merged = reference.merged(str(cache), lora_merge_dtype="float32").model.path
    except BaseException:  # mergekit takes any folder that is there for a finished one
        for folder in set(cache.iterdir() if cache.is_dir() else ()) - before:
            shutil.rmtree(folder)
        raise
    if not (Path(merged) / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(reference.model.path).save_pretrained(merged)
    return str(Path(merged).absolute())
