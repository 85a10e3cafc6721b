"""Every private or version-dependent name of transformers that this package uses, in one file.

Written against transformers 5.23. Its auto classes, configurations, models and tokenizers are
public and stable: they are imported where they are needed. All other names are imported here, and
from here by other modules, so that the next release of transformers breaks this file alone.
"""

# Modules on the meta device: weights take no memory, and no initial values are computed.
from accelerate import init_empty_weights

# The rules that turn a checkpoint's weights into the model's: renamed, or made from several.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

# The base class of decoder blocks; it distinguishes their list from others of the same length.
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
