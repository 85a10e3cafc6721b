"""Checks of a configuration against the models' own configurations."""

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.errors import CalibrationError, ConfigError
from mergekit_dam.request.check import Checked
from mergekit_dam.request.slices import check_layers


def vocab_size_of(model: ModelReference, options: MergeOptions) -> int:
    """The vocabulary size in a model's own configuration."""
    config = model.config(trust_remote_code=options.trust_remote_code)
    size: int = config.get_text_config().vocab_size
    return size


def check_depth(config: MergeConfiguration, checked: Checked, options: MergeOptions) -> None:
    """Refuse layers that a model does not have; skips models without a readable configuration.

    Raises:
        ConfigError: With every such range, and with models of different depth.
    """
    if len(config.modules or {}) > 1:
        return  # towers other than the text model have their depth under other keys
    layers = {}
    for model in {m for m in (*checked.models, checked.base) if m is not None}:
        try:
            text = model.config(trust_remote_code=options.trust_remote_code).get_text_config()
        except (OSError, ValueError):
            continue  # reported with the reason when the model is loaded
        if getattr(text, "num_hidden_layers", None):
            layers[model] = text.num_hidden_layers
    problems = check_layers(config, layers, checked.calibrations)
    if problems:
        raise ConfigError(*problems)


def check_length(checked: Checked, options: MergeOptions) -> None:
    """Refuse sequences that are longer than a model's number of positions.

    Raises:
        CalibrationError: With the name of the model.
    """
    for model in checked.calibrations:
        config = model.config(trust_remote_code=options.trust_remote_code).get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest and checked.run.sequence_length > longest:
            raise CalibrationError(
                f"calibration of {model}: `sequence_length` is {checked.run.sequence_length}, but "
                f"the model has {longest} positions; set `sequence_length: {longest}` or less"
            )
