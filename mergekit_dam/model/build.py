"""A transformers model without weights: its class, its module tree, its list of blocks.

The names of architectures play no role: mergekit knows which transformers class loads a model,
and transformers knows which module holds the language model.
"""

from typing import Any

import transformers
from mergekit.common import get_auto_cls
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.compat import (
    GradientCheckpointingLayer,
    init_empty_weights,
    no_init_weights,
)

_CLASSES: dict[Any, Any] = {
    AutoModelForCausalLM: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}

OTHER_METHODS = "Merge it with one of mergekit's other methods, such as `linear`."


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers that loads a model.

    Raises:
        ArchitectureError: The model is neither a causal language model nor a vision-language
            model around one.
    """
    architecture = next(iter(config.architectures or ()), None)
    if architecture is None:
        return AutoModelForCausalLM
    auto: Any = get_auto_cls(architecture)
    if auto not in _CLASSES:
        raise _no_decoder(architecture, config, f"{getattr(auto, '__name__', auto)} loads it")
    # mergekit treats every architecture that it does not know as a causal language model.
    own, causal = getattr(transformers, architecture, None), _CLASSES[auto].get(type(config), None)
    # One that is registered at run time, with remote code, may have the name of one of theirs.
    if own is not None and causal is not None and causal.__name__ != architecture:
        raise _no_decoder(architecture, config, f"the causal model is {causal.__name__}")
    return auto


def build_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The module tree of a language model, with weights on the meta device and real buffers.

    Raises:
        ArchitectureError: transformers cannot build the model, or the model is not a causal
            decoder that can run on text alone.
    """
    auto = auto_class(config)
    try:
        # include_buffers=False: buffers on the meta device would lose the rotary frequencies.
        with init_empty_weights(include_buffers=False), no_init_weights():
            # "eager" runs one expert after the other; grouped products would copy all of them.
            model = auto.from_config(
                config, trust_remote_code=trust_remote_code, experts_implementation="eager"
            )
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise ArchitectureError(
            f"transformers builds no causal language model from {config.architectures}: {error}"
        ) from error
    if getattr(model.config, "is_encoder_decoder", False):
        raise _no_decoder(type(model).__name__, config, "its decoder reads an encoder's output")
    model.tie_weights()
    built: PreTrainedModel = model.eval()
    return built


def _no_decoder(name: str, config: PretrainedConfig, why: str) -> ArchitectureError:
    return ArchitectureError(
        f"required a causal language model, or a vision-language model around one, got {name} "
        f"(model type {config.model_type}): {why}. dam fits the hidden states of a causal "
        f"decoder on text. {OTHER_METHODS}"
    )


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path of the list of decoder blocks in a model, and the list.

    Raises:
        ArchitectureError: The model has no such list, or several.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    within = decoder if isinstance(decoder, PreTrainedModel) else model
    own = {id(module) for module in within.modules()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in own and len(module) == layers
    ]
    if len(found) > 1:
        found = [
            (name, module)
            for name, module in found
            if all(isinstance(member, GradientCheckpointingLayer) for member in module)
        ]
    if len(found) != 1:
        raise ArchitectureError(
            f"required one list of {layers} decoder blocks in {type(model).__name__}, "
            f"found {len(found)}; dam cannot cut this architecture into blocks. {OTHER_METHODS}"
        )
    return found[0]
