"""The decoders of all sources; models that compute the same share one."""

from collections.abc import Mapping, Sequence

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
    """Every source's decoder; the merged model's own wherever the forward pass is the same.

    Args:
        stacks: which of its layers a source has at each layer of the merged model; sources that
            have none there run nothing.

    Raises:
        ArchitectureError: a source has a head of its own, the merged model none.
    """
    decoders = {_forward_key(output.config): output}
    found = []
    for model in order:
        config = model.config(trust_remote_code=options.trust_remote_code)
        if _ties_head(output.config) and not _ties_head(config):
            raise ArchitectureError(
                f"{model} has an output head of its own, but the merged model takes its from the "
                f"embeddings: its configuration is that of the base, else of the first model. Name "
                f"one with `tie_word_embeddings: false` there"
            )
        config = stacked(config, stacks[model]) if model in stacks else output.config
        key = _forward_key(config)
        if key not in decoders:
            decoders[key] = make_decoder(
                config, torch.device("cpu"), trust_remote_code=options.trust_remote_code
            )
        found.append(decoders[key])
    return tuple(found)


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


def _forward_key(config: PretrainedConfig) -> str:
    """Equal for configurations whose blocks compute the same from the same weights."""
    values = config.to_dict()
    return str(sorted((k, str(v)) for k, v in values.items() if k not in _NOT_OF_THE_FORWARD))
