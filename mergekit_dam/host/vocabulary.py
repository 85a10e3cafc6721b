"""The merged vocabulary, built by mergekit, and checks that mergekit would make too late."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from transformers import PreTrainedTokenizerFast

from mergekit_dam.errors import ConfigError, listed
from mergekit_dam.host.compat import (
    ModelTokenEmbedding,
    TokenEmbeddingConfig,
    TokenizerInfo,
    ZeroEmbedding,
    build_tokenizer,
    get_vocab_size,
)
from mergekit_dam.vocabulary.merged import LOST, Vocabulary
from mergekit_dam.vocabulary.tokenizers import has_tokenizer, load_tokenizer


def build_vocabulary(
    config: MergeConfiguration, models: Sequence[ModelReference], trust_remote_code: bool
) -> Vocabulary | None:
    """Have mergekit build the merged model's vocabulary, if the configuration asks for one.

    Args:
        config: mergekit's configuration.
        models: the base, if there is one, and the models, in the order of the configuration.
        trust_remote_code: whether tokenizers may run code from the Hub.

    Raises:
        CalibrationError: a tokenizer cannot be loaded.
        ConfigError: mergekit cannot build the vocabulary, or cannot align the models' rows to it.
    """
    asked = config.tokenizer
    source = asked.source if asked is not None else config.tokenizer_source
    if source is None:
        return None
    overrides = (asked.tokens if asked is not None else None) or {}
    try:
        with _listed_by_id(), _adapters_as_models(models, trust_remote_code) as read:
            info = build_tokenizer(
                base_model=read.get(config.base_model, config.base_model),
                referenced_models=[read.get(model, model) for model in models],
                tokenizer_source=read.get(source, source),
                trust_remote_code=trust_remote_code,
                add_tokens=list(overrides),
            )
        info = _by_model(info, {own: model for model, own in read.items()})
    except Exception as error:  # RuntimeError, OSError, and whatever tokenizers raise
        for model in [*models, *([source] if isinstance(source, ModelReference) else [])]:
            load_tokenizer(model, trust_remote_code)  # names a missing one, with a remedy
        raise ConfigError(f"tokenizer: mergekit cannot build it: {error}") from error
    ids = info.tokenizer.get_vocab()
    problems = [
        *_gaps(ids),
        *_rows_missing(info),
        *_overrides_missing(info, models, overrides, trust_remote_code),
    ]
    if problems:
        raise ConfigError(*problems)
    multiple = (asked.pad_to_multiple_of if asked is not None else None) or 1
    size = -(-len(ids) // multiple) * multiple  # rounded up
    giver = str(models[0] if source == "base" else source)
    return Vocabulary(info, size, giver)


@contextmanager
def _adapters_as_models(
    models: Sequence[ModelReference], trust_remote_code: bool
) -> Iterator[dict[ModelReference | str | None, ModelReference]]:
    """Models with the tokenizers and the rows of adapters that have a tokenizer of their own.

    mergekit would read the tokenizer of the adapter's base, without the tokens that were added.

    Yields:
        Model with an adapter -> a model with its tokenizer and its number of rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        read: dict[ModelReference | str | None, ModelReference] = {}
        for number, model in enumerate(models):
            if model.lora is not None and has_tokenizer(model.lora):
                own = Path(folder) / str(number)
                model.config(trust_remote_code).save_pretrained(own)
                load_tokenizer(model, trust_remote_code).save_pretrained(own)
                read[model] = ModelReference(model=ModelPath(path=str(own)))
        yield read


def _by_model(info: TokenizerInfo, models: Mapping[ModelReference, Any]) -> TokenizerInfo:
    """Mergekit's information on the tokenizers, by the models of the merge."""
    permutations = {models.get(own, own): ids for own, ids in info.permutations.items()}
    vocabularies = {models.get(own, own): ids for own, ids in info.original_vocabs.items()}
    return TokenizerInfo(
        tokenizer=info.tokenizer, permutations=permutations, original_vocabs=vocabularies
    )


@contextmanager
def _listed_by_id() -> Iterator[None]:
    """Make fast tokenizers list their tokens by id.

    They list them in another order each time, and mergekit numbers the tokens of a union in that
    order. The same merge would get other ids in every run, and a replay other ids than the fit.
    """
    stock = PreTrainedTokenizerFast.get_vocab

    def get_vocab(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
        return dict(sorted(stock(tokenizer).items(), key=itemgetter(1)))

    PreTrainedTokenizerFast.get_vocab = get_vocab  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedTokenizerFast.get_vocab = stock  # type: ignore[method-assign]


def _gaps(ids: Mapping[str, int]) -> list[str]:
    """The problem that ids have gaps: mergekit makes as many rows as there are tokens."""
    last = max(ids.values())
    if last < len(ids):
        return []
    return [
        f"tokenizer: mergekit can only number tokens without gaps, but the last of {len(ids):,} "
        f"tokens has id {last}; use another `source`, or remove the section `tokenizer` if all "
        f"models have the same tokens"
    ]


def _rows_missing(info: TokenizerInfo) -> list[str]:
    """Problems with tokens of a model's tokenizer that have no row in its embedding."""
    problems = []
    ids = info.tokenizer.get_vocab()
    for model, permutation in info.permutations.items():
        beyond = [token for token, new in ids.items() if new not in permutation]
        if beyond:
            problems.append(
                f"tokenizer: {model} has {len(beyond)} tokens "
                f"({listed(sorted(map(repr, beyond)))}) without a row of its embedding, as "
                f"`vocab_size` in its config.json says; give it the tokenizer that it was trained "
                f"with, or resize its embedding"
            )
    return problems


def _overrides_missing(
    info: TokenizerInfo,
    models: Sequence[ModelReference],
    overrides: Mapping[str, TokenEmbeddingConfig],
    trust_remote_code: bool,
) -> list[str]:
    """Problems with overrides of tokens that name an embedding that does not exist."""
    problems = []
    for token, override in overrides.items():
        new = info.tokenizer.get_vocab()[token]
        had = [model for model in models if info.permutations[model].get(new, LOST) >= 0]
        if not override.force and len(had) == len(models):
            continue  # mergekit ignores the override
        where, source = f"tokenizer.tokens[{token!r}]", override.source
        if source is None:
            problems.append(
                f"{where}: required a `source`, since "
                f"{'`force` is set' if override.force else 'some models do not have the token'}"
            )
        elif isinstance(source, ModelTokenEmbedding):
            problems += [
                f"{where}: {p}"
                for p in _model_token_missing(info, models, source, trust_remote_code)
            ]
        elif not isinstance(source, ZeroEmbedding) and source not in had:
            reason = "does not have the token" if source in models else "is no model of the merge"
            problems.append(f"{where}: its `source` {source} {reason}")
    return problems


def _model_token_missing(
    info: TokenizerInfo,
    models: Sequence[ModelReference],
    source: ModelTokenEmbedding,
    trust_remote_code: bool,
) -> list[str]:
    if source.model not in models:
        return [f"its `source` {source.model} is no model of the merge"]
    rows = get_vocab_size(source.model.model, trust_remote_code=trust_remote_code)
    if source.token_id is not None and rows is not None and not 0 <= source.token_id < rows:
        return [f"{source.model} has no row {source.token_id}; it has {rows} rows"]
    vocabulary = info.original_vocabs.get(source.model, {})
    if source.token is not None and source.token not in vocabulary:
        return [f"{source.model} has no token {source.token!r}"]
    return []
