"""The models of a configuration as a dam merge reads them.

mergekit asks its `ModelReference` for everything that it reads of a model: configuration, folder,
loader, merged adapter. A dam merge puts a `Source` in the place of each, so that mergekit gets
plain weights, with a configuration that fits them, wherever it asks.
"""

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from os.path import normpath
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel
from transformers import PretrainedConfig

from mergekit_dam.errors import ArchitectureError, first_line, inside
from mergekit_dam.host.adapters import adapter_rows, base_of, merged_adapter
from mergekit_dam.host.compat import LoaderCache
from mergekit_dam.host.files import folder_of, holds_weights, is_adapter
from mergekit_dam.host.loaders import PlainLoader, plain_loader
from mergekit_dam.model.build import build_model
from mergekit_dam.model.heads import files_untie_head


class Source(ModelReference, frozen=True):
    """A model of a dam merge: mergekit's reference, which gives plain weights.

    Quantised weights are dequantised as they are read. The configuration says what the files hold:
    no quantisation, a head of its own if there is one, and the rows that an adapter adds.
    """

    def config(self, trust_remote_code: bool = False) -> PretrainedConfig:
        """The configuration; raises what transformers raises where it cannot be read."""
        config = super().config(trust_remote_code)
        for own in (config, config.get_text_config()):
            vars(own).pop("quantization_config", None)
        if _unties_head(self, trust_remote_code):
            for own in (config, config.get_text_config()):
                own.tie_word_embeddings = False
        rows = None
        if self.lora is not None:
            rows = adapter_rows(self.lora, Source(model=self.model), trust_remote_code)
        if rows is not None:
            config.get_text_config().vocab_size = rows
        return config

    def merged(
        self,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        lora_merge_dtype: str | None = None,
    ) -> "Source":
        """The model that its adapter makes of it; itself without an adapter."""
        if self.lora is None:
            return self
        if cache_dir is None:
            raise ArchitectureError(f"{self}: required a folder for the merged adapter, got none")
        folder = merged_adapter(
            Source(model=self.model, override_architecture=self.override_architecture),
            self.lora,
            Path(cache_dir),
            trust_remote_code=trust_remote_code,
            dtype=dtype_from_name(lora_merge_dtype),
        )
        return Source(
            model=ModelPath(path=str(folder)), override_architecture=self.override_architecture
        )

    def local_path(self, cache_dir: str | None = None, ignore_lora: bool = False) -> str:
        """The folder with the files of the model, or of the adapter's base."""
        try:
            return str(super().local_path(cache_dir, ignore_lora=True))
        except (OSError, ValueError) as error:
            found = folder_of(self.model, cache_dir)
            if found is not None:
                return str(found)
            raise ArchitectureError(
                f"{self.model}: required a folder, or a model in the Hub's cache, and the Hub "
                f"cannot be asked ({first_line(error)}); check the path, or download it where "
                f"there is a connection: hf download {self.model.path}"
            ) from error

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> PlainLoader:
        """The loader of the model's weights, or of those of the adapter's base."""
        return loader_of(Path(self.local_path(cache_dir)), lazy_unpickle=lazy_unpickle)


def with_sources(config: MergeConfiguration) -> MergeConfiguration:
    """A configuration with a `Source` in the place of every model that it names.

    What is known of the models' files from an earlier merge of this process is forgotten.

    Raises:
        ConfigError: an adapter stands alone, and its base cannot be found.
    """
    forget()
    known: dict[ModelReference, Source] = {}

    def source(reference: ModelReference) -> Source:
        if reference not in known:
            known[reference] = source_of(reference)
            LoaderCache().loaders.pop(known[reference], None)
        return known[reference]

    replaced: MergeConfiguration = _replaced(config, source)
    return replaced


def source_of(reference: ModelReference) -> Source:
    """The source that a reference of mergekit's means.

    mergekit takes every `+` for the beginning of an adapter and every `@` for that of a revision;
    where a folder has the whole name, it is the folder. An adapter alone means its base with it.
    `A` and `A/` are one model.

    Raises:
        ConfigError: an adapter stands alone, and its base cannot be found.
    """
    if isinstance(reference, Source):
        return reference
    model, lora = _cleaned(reference.model), reference.lora
    whole = str(reference)
    if lora is not None and Path(whole).exists() and not is_adapter(lora):
        model, lora = _cleaned(ModelPath(path=whole)), None
    lora = None if lora is None else _cleaned(lora)
    if lora is None and is_adapter(model):
        model, lora = _cleaned(base_of(model)), model
    return Source(model=model, lora=lora, override_architecture=reference.override_architecture)


def check_sources(models: Iterable[ModelReference]) -> None:
    """Refuse files that cannot be read as weights, of models that are on this machine already.

    Raises:
        DamError: the message names the model, what its files are, and what to do.
    """
    for model in models:
        loader = _loader_of_present(model)
        if model.lora is None:
            continue
        adapter_rows(model.lora, Source(model=model.model), LoaderCache().trust_remote_code)
        if loader is not None and loader.quantisation.weights:
            raise ArchitectureError(
                f"{model}: required an adapter of plain weights, but {model.model} is quantised "
                f"({loader.quantisation.name}); write the model that it was quantised from in "
                f"its place"
            )


def open_sources(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Download models and merge adapters where that is left to do, and open all files."""
    LoaderCache().setup(options=options)
    for model in models:
        LoaderCache().get(model)
    forget()


def forget() -> None:
    """Forget what is known of files, which may be others now."""
    _unties_head.cache_clear()
    adapter_rows.cache_clear()


@lru_cache(maxsize=256)  # a skeleton of the model is built, and a head compared
def _unties_head(source: Source, trust_remote_code: bool) -> bool:
    """Whether a model has a head of its own although its configuration ties it."""
    opened = LoaderCache().loaders.get(source)
    config = ModelReference.config(source, trust_remote_code)
    try:
        loader = opened if isinstance(opened, PlainLoader) else _loader_of_present(source)
        model = build_model(config, trust_remote_code=trust_remote_code)
    except ArchitectureError:
        return False  # said where the model is checked
    if loader is None or not loader.has_values:
        return False
    with inside(str(source)):
        return files_untie_head(model, loader.index.tensor_paths, loader.required)


def _loader_of_present(model: ModelReference) -> PlainLoader | None:
    """The loader of a model whose files are here; None if they are yet to be downloaded."""
    folder = folder_of(model.model, LoaderCache().hf_cache_dir)
    if folder is None:
        return None
    if not Path(model.model.path).exists() and not holds_weights(folder):
        return None  # the Hub's cache has its configuration or tokenizer alone
    with inside(str(model)):
        return loader_of(folder, lazy_unpickle=False)


def loader_of(folder: Path, *, lazy_unpickle: bool, has_values: bool = True) -> PlainLoader:
    """The loader of the files in a folder; the configuration beside them says how to read them.

    Args:
        has_values: whether the files hold values, and not headers alone.

    Raises:
        ArchitectureError: the files are missing or damaged, or of a format that cannot be read.
    """
    file = folder / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    text = stored.get("text_config") or {}
    settings = next((o[k] for o in (stored, text) for k in _QUANTISED if o.get(k)), None)
    named = next((o[k] for o in (stored, text) for k in ("dtype", "torch_dtype") if o.get(k)), "")
    dtype = getattr(torch, str(named), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        dtype = torch.bfloat16
    return plain_loader(folder, settings, dtype, lazy_unpickle=lazy_unpickle, has_values=has_values)


_QUANTISED = ("quantization_config", "compression_config")


def _cleaned(path: ModelPath) -> ModelPath:
    """A path without what spells the same folder in another way; ids of the Hub stay."""
    if path.revision is not None and not Path(path.path).exists() and Path(str(path)).exists():
        path = ModelPath(path=str(path))
    spelt = normpath(path.path) if Path(path.path).exists() else path.path.rstrip("/")
    return ModelPath(path=spelt, revision=path.revision)


def _replaced(value: Any, source: Callable[[ModelReference], Source]) -> Any:
    """A value of the configuration with its references replaced."""
    if isinstance(value, ModelReference):
        return source(value)
    if isinstance(value, BaseModel):
        fields = {
            name: _replaced(getattr(value, name), source) for name in type(value).model_fields
        }
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {key: _replaced(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, source) for item in value]
    return value
