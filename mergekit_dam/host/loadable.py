"""Tensors that mergekit can load but would leave out of the merged model.

If mergekit infers an architecture, a tensor is optional if one layer has it and another does not.
mergekit skips optional tensors that no file holds under that name, although its loader can make
them from other tensors (fused experts, renamed weights).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from mergekit_dam.host.compat import LoaderCache, ModelArchitecture, WeightInfo
from mergekit_dam.host.headers import is_made
from mergekit_dam.model.build import build_model
from mergekit_dam.model.names import WeightNames


@dataclass(frozen=True)
class Loadable:
    """The tensors that every model's loader can provide although no file has them by name.

    Attributes:
        architecture: mergekit's definition of the architecture, which its plan follows.
        config: configuration of the merged model.
    """

    architecture: ModelArchitecture
    config: PretrainedConfig
    _renamed: dict[ModelReference, dict[str, str]] = field(default_factory=dict)

    def required(
        self, weight: WeightInfo, inputs: Sequence[WeightInfo], models: Sequence[ModelReference]
    ) -> tuple[WeightInfo, list[WeightInfo]]:
        """The tensor and its inputs, no longer optional if every model can load them."""
        pairs = zip(models, inputs, strict=True)
        found = [self._loaded(model, info) for model, info in pairs]
        brought = [info for info in found if info is not None]
        if len(brought) < len(found):
            return weight, list(inputs)
        return weight.model_copy(update={"optional": False}), brought

    def _loaded(self, model: ModelReference, info: WeightInfo) -> WeightInfo | None:
        """A tensor as it can be loaded; None if it is stored under its name, or not at all."""
        paths = LoaderCache().get(model).index.tensor_paths
        if info.name in paths:
            return None
        stored = set(paths)
        alias = self._aliases(model, stored).get(info.name)
        if alias is not None:
            return info.model_copy(update={"optional": False, "aliases": (alias,)})
        if is_made(model, info.name, stored):
            return info.model_copy(update={"optional": False})
        return None

    def _aliases(self, model: ModelReference, stored: set[str]) -> dict[str, str]:
        """Model weight -> its name in the files, for weights that mergekit's definition lacks."""
        if model not in self._renamed:
            listed = {weight.name for weight in self.architecture.all_weights(self.config)}
            left = sorted(stored - listed)
            self._renamed[model] = {}
            if left:
                trusted = LoaderCache().trust_remote_code
                names = WeightNames.of(build_model(self.config, trust_remote_code=trusted))
                found = {names.in_model(name): name for name in left}
                self._renamed[model] = {name: alias for name, alias in found.items() if name}
        return self._renamed[model]
