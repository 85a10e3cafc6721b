"""Tensors that mergekit can load, and would yet leave out of the merged model.

Where an architecture is inferred, mergekit calls a tensor optional that one layer has and another
has not, and skips optional tensors that no file holds by that name, though its loader would make
them of others (experts that are fused, weights that are renamed).
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
    """Which tensors every model's loader can bring, though no file has them by name.

    Attributes:
        architecture: what mergekit plans by.
        config: of the merged model.
    """

    architecture: ModelArchitecture
    config: PretrainedConfig
    _renamed: dict[ModelReference, dict[str, str]] = field(default_factory=dict)

    def required(
        self, weight: WeightInfo, inputs: Sequence[WeightInfo], models: Sequence[ModelReference]
    ) -> tuple[WeightInfo, list[WeightInfo]]:
        """The tensor and its inputs, not optional where they can be loaded."""
        pairs = zip(models, inputs, strict=True)
        found = [self._loaded(model, info) for model, info in pairs]
        brought = [info for info in found if info is not None]
        if len(brought) < len(found):
            return weight, list(inputs)
        return weight.model_copy(update={"optional": False}), brought

    def _loaded(self, model: ModelReference, info: WeightInfo) -> WeightInfo | None:
        """A tensor as it can be loaded; None where it is stored by its name, or not at all."""
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
        """Names of the model's weights -> what its files call them, of what mergekit lists not."""
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
