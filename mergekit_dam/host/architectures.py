"""What mergekit and transformers say of the models' architectures, before anything is read."""

from collections.abc import Iterable

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.errors import ArchitectureError, first_line, inside
from mergekit_dam.host.compat import arch_info_for_config
from mergekit_dam.model.build import auto_class


def check_architectures(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Refuse what no merge gets beyond, and models without a causal decoder.

    Raises:
        ArchitectureError: naming the model.
    """
    for model in models:
        try:
            config = model.config(trust_remote_code=options.trust_remote_code)
        except OSError:
            continue  # it is not there: told when its tokenizer is loaded
        except (ValueError, KeyError, ImportError) as error:
            raise ArchitectureError(
                f"{model}: transformers cannot read its configuration, so that no method of "
                f"mergekit can merge it: {first_line(error)}"
            ) from error
        architectures = config.architectures or []
        if len(architectures) != 1:
            raise ArchitectureError(
                f"{model}: required one entry under `architectures` in its config.json, got "
                f"{architectures}; name the class that it was saved from"
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
                    f"{model}: mergekit's definition of {architectures[0]} looks for "
                    f"`{key}` of its {name} in the configuration, where transformers 5 has none; "
                    f"no method of mergekit can merge it"
                ) from error
