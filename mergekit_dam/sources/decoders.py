"""The decoders of all sources; sources with the same forward pass share one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.probe import make_decoder
from mergekit_dam.sources.slices import stacked


def source_decoders(
    output: Decoder,
    order: Sequence[ModelReference],
    options: MergeOptions,
    stacks: Mapping[ModelReference, Sequence[int]],
) -> tuple[Decoder, ...]:
    """The decoder of every source: the merged model's own where the forward pass is the same.

    Args:
        output: Decoder of the merged model.
        stacks: For a source, its own layer at each layer of the merged model. Sources that are
            absent are not run.

    Raises:
        ArchitectureError: A source has an output head of its own, but the merged model has none.
    """
    decoders = {_forward_key(output.config): output}
    found = []
    for model in order:
        config = model.config(trust_remote_code=options.trust_remote_code)
        if _ties_head(output.config) and not _ties_head(config):
            raise ArchitectureError(
                f"{model} has an output head of its own, but the merged model's head is tied to "
                f"its embeddings: the merged configuration is that of the base model, or of the "
                f"first model if there is no base. Choose a base or first model with "
                f"`tie_word_embeddings: false`"
            )
        config = stacked(config, stacks[model]) if model in stacks else output.config
        key = _forward_key(config)
        if key not in decoders:
            decoders[key] = make_decoder(
                config, torch.device("cpu"), trust_remote_code=options.trust_remote_code
            )
        found.append(decoders[key])
    return tuple(found)


def differences(config: PretrainedConfig, other: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Entries of two configurations of one class by which their blocks compute differently.

    Entries that the class does not know count for nothing, and so do lists with an entry per layer.

    Returns:
        Entry -> its value in the one and in the other.
    """
    one, two = config.get_text_config(), other.get_text_config()
    values, others = one.to_dict(), two.to_dict()
    known = type(one)().to_dict().keys() - {*_NOT_OF_THE_FORWARD, *_NOT_OF_THE_BLOCKS}
    return {
        key: (values.get(key), others.get(key))
        for key in sorted(known)
        if values.get(key) != others.get(key)
        and not any(part in key for part in ("dropout", "_token_id"))
        and not isinstance(values.get(key), list)
    }


def _ties_head(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


_NOT_OF_THE_FORWARD = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
)
_NOT_OF_THE_BLOCKS = (
    "initializer_range",
    "max_position_embeddings",
    "num_hidden_layers",
    "pretraining_tp",
)


def _forward_key(config: PretrainedConfig) -> str:
    """A key that is equal for configurations whose blocks compute the same from equal weights."""
    values = config.to_dict()
    return str(sorted((k, str(v)) for k, v in values.items() if k not in _NOT_OF_THE_FORWARD))
