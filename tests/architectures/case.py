"""A case: a tiny model of an architecture, and what becomes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import transformers as tf
from torch import Tensor

EXPERTS = "experts"
ROUTER_BIAS = "biases of routers and experts"
STATES = "states, convolutions, activations"
HEAD_BIAS = "bias of the head"
VISION = "all that sees images"
BUFFERS = "buffers of transformers 4"
POSITIONS = "positions"
QK_NORMS = "norms of q and k"
OUTSIDE = (VISION, BUFFERS)
"""Kinds of tensors outside of the decoder."""

NO_DECODER = r"required a causal language model"
MISSING = r"required the same tensors in all models"


@dataclass(frozen=True)
class Case:
    """A tiny model of an architecture.

    Attributes:
        title: name of the architecture in the README.
        config: makes the configuration.
        averaged: kinds of tensors that are not fitted, each with a regular expression of their
            names.
        kind: class of the model; by default transformers' class of causal language models.
        stored: changes the tensors of a saved model to those of models on the Hub.
        refused: regular expression of dam's message, if dam refuses the architecture.
    """

    title: str
    config: Callable[[], tf.PretrainedConfig]
    averaged: Mapping[str, str] = field(default_factory=dict)
    kind: type[tf.PreTrainedModel] | None = None
    stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    refused: str | None = None
