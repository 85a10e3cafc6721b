"""Every private or version-dependent name of transformers that this package builds on, in one file.

Written against transformers 5.23. Public and stable are its auto classes, configurations, models
and tokenizers: these are imported where they are needed. All else is imported here and from here,
so that the next release of transformers breaks this file alone.
"""

# Modules on the meta device: weights take no memory, and their initial values are never made.
from accelerate import init_empty_weights

# How a checkpoint's names of weights become those of the model: renamed, or made of several.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

# The base class of decoder blocks, which tells their list from others of the same length.
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "GradientCheckpointingLayer",
    "WeightConverter",
    "WeightRenaming",
    "get_model_conversion_mapping",
    "init_empty_weights",
    "no_init_weights",
    "rename_source_key",
]
