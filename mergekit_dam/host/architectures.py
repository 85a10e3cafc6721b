"""Checks of the models' architectures from their configurations, before anything is read."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.errors import ArchitectureError, DamError, first_line, inside
from mergekit_dam.host.compat import arch_info_for_config
from mergekit_dam.model.build import auto_class
from mergekit_dam.sources.decoders import differences

LOG = logging.getLogger(__name__)


def warn_of_differences(models: Sequence[ModelReference], options: MergeOptions) -> None:
    """Warn of models whose blocks compute otherwise than the merged model's will.

    Shapes do not tell: 4 heads of 16 have those of 8 heads of 8.

    Args:
        models: the base or the first model, whose configuration the merged model gets; the others.
    """
    donor, *others = models
    merged = donor.config(trust_remote_code=options.trust_remote_code)
    for model in others:
        config = model.config(trust_remote_code=options.trust_remote_code)
        if type(config) is not type(merged):
            continue  # another architecture, which mergekit refuses or is told to accept
        found = differences(config, merged)
        if found:
            said = "; ".join(f"`{key}` {own}, not {its}" for key, (own, its) in found.items())
            LOG.warning(
                "%s computes otherwise than %s, whose configuration the merged model gets: %s. As "
                "a teacher it runs with its own, but its weights will run with the other",
                *(model, donor, said),
            )


def check_readable(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Check that transformers can read every model's configuration.

    Raises:
        DamError: a configuration cannot be read; the message names the model.
    """
    for model in models:
        try:
            model.config(trust_remote_code=options.trust_remote_code)
        except (OSError, ValueError) as error:
            raise DamError(
                f"{model}: required a folder with a model, or the id of one on the Hub; its "
                f"configuration cannot be read ({first_line(error)})"
            ) from error


def check_architectures(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Refuse models that no merge method can handle, and models without a causal decoder.

    Raises:
        ArchitectureError: a model cannot be merged; the message names it.
    """
    for model in models:
        try:
            config = model.config(trust_remote_code=options.trust_remote_code)
        except Exception as error:  # OSError, ValueError, KeyError, its validators' own
            if isinstance(error, OSError) and not Path(model.model.path, "config.json").exists():
                continue  # not found: loading its tokenizer reports that
            reason = " ".join(str(error).split("\n")[:2])  # validators give theirs in a second line
            if "trust_remote_code" in str(error):
                reason += "; pass --trust-remote-code if you trust it"
            raise ArchitectureError(
                f"{model}: transformers cannot read its configuration (config.json), so no merge "
                f"method of mergekit can merge it: {reason}"
            ) from error
        architectures = config.architectures or []
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise ArchitectureError(
                f"{model}: required one entry under `architectures` in its config.json, got "
                f"{architectures}; name the class that the model was saved from"
            )
        with inside(str(model)):
            auto_class(config)
        defined = arch_info_for_config(config)
        for name, module in () if defined is None else defined.modules.items():
            try:
                module.architecture.num_layers(config)
            except (RuntimeError, AttributeError) as error:
                key = module.architecture.num_layers_config_key()
                raise ArchitectureError(
                    f"{model}: mergekit's definition of {architectures[0]} reads "
                    f"`{key}` of its {name} from the configuration, but transformers 5 has no such "
                    f"entry; no merge method of mergekit can merge it"
                ) from error
