"""A model that is judged: where it is, its tokenizer, and its weights, a few at a time."""

import contextlib
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from mergekit_dam.errors import DamError, first_line, inside, listed
from mergekit_dam.host.compat import LoaderCache, LoadTensor
from mergekit_dam.host.headers import is_made
from mergekit_dam.host.references import Source, forget, source_of
from mergekit_dam.model.named import REMEDY, require_model
from mergekit_dam.model.names import WeightNames
from mergekit_dam.sources.finite import require_finite
from mergekit_dam.vocabulary.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Judged:
    """A model that is judged.

    Attributes:
        name: The name that the user gave: a folder, an id on the Hub, or BASE+ADAPTER.
        source: What it means.
        trust_remote_code: Whether code that comes with it may run.
    """

    name: str
    source: Source
    trust_remote_code: bool

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        with inside(f"the model {self.name}"):
            return load_tokenizer(self.source, self.trust_remote_code)

    @cached_property
    def vocab_size(self) -> int:
        """The size of the vocabulary in its configuration."""
        try:
            config = self.source.config(self.trust_remote_code)
        except Exception as error:  # OSError, ValueError, KeyError, remote code
            raise DamError(
                f"the configuration of {self.name} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}): {REMEDY}"
            ) from error
        size: int = config.get_text_config().vocab_size
        return size

    def folder(self) -> str:
        """The folder with its weights; an adapter is merged first."""
        cache = LoaderCache().lora_cache_dir
        merged = self.source.merged(cache, self.trust_remote_code)
        return merged.local_path(LoaderCache().hf_cache_dir)

    def check(self, names: WeightNames, needed: Iterable[str]) -> None:
        """Check that weights are there, from headers alone.

        Raises:
            DamError: Some are missing; the message names the first ones.
        """
        stored = set(LoaderCache().get(self.source).index.tensor_paths)
        aliases = _aliases(names, stored)
        missing = [
            name
            for name in needed
            if name not in aliases and not is_made(self.source, name, stored)
        ]
        if missing:  # transformers would draw them at random
            raise DamError(
                f"the model {self.name} has no weights for {listed(missing)}, which its "
                f"config.json asks for: {REMEDY}"
            )

    def read(self, names: WeightNames, wanted: Collection[str], device: str) -> dict[str, Tensor]:
        """Weights by the first of their names in the model, as they are stored.

        Raises:
            CheckpointError: A value is not finite.
        """
        aliases = _aliases(names, LoaderCache().get(self.source).index.tensor_paths)
        found = {}
        for name in wanted:
            load = LoadTensor(
                model=self.source,
                tensor=aliases.get(name, name),
                device=device,
            )
            tensor = load.execute()
            assert tensor is not None  # it raises where there is none
            found[name] = tensor
        require_finite({name: {self.name: tensor} for name, tensor in found.items()})
        return found


def _aliases(names: WeightNames, stored: Iterable[str]) -> dict[str, str]:
    """First name of each weight in the model -> its name in the files."""
    found = {names.canonical(name): name for name in stored}
    return {name: alias for name, alias in found.items() if name is not None}


@contextlib.contextmanager
def judged_models(names: Iterable[str], trust_remote_code: bool) -> Iterator[dict[str, Judged]]:
    """The models of some names; adapters are merged into a folder that is removed at the end.

    Raises:
        DamError: A name means no model.
    """
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        require_model(name)
    forget()
    before = dict(LoaderCache().loaders)
    with tempfile.TemporaryDirectory(prefix="dam-adapters-") as folder:
        options = MergeOptions(lora_merge_cache=folder, trust_remote_code=trust_remote_code)
        LoaderCache().setup(options=options)
        LoaderCache().loaders.clear()
        try:
            references = {name: ModelReference.model_validate(name) for name in wanted}
            yield {
                name: Judged(name, source_of(reference), trust_remote_code)
                for name, reference in references.items()
            }
        finally:
            LoaderCache().loaders.clear()
            LoaderCache().loaders.update(before)


def stored_dtype(judged: Judged) -> torch.dtype:
    """The dtype of a model's weights, as its configuration says."""
    dtype = getattr(judged.source.config(judged.trust_remote_code), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
