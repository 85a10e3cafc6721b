"""Checks of the models' architectures from their configurations, before anything is read."""

from collections.abc import Iterable
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.errors import ArchitectureError, inside
from mergekit_dam.host.compat import arch_info_for_config
from mergekit_dam.model.build import auto_class


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
