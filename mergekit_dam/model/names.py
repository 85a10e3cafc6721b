"""TODO mergekit_dam/model/names.py."""

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class WeightNames:
    """What the weights of a model are called: its parameters, and the buffers that it saves.

    Attributes:
        first: every name -> the first name of that weight (tied ones share it).
    """

    first: dict[str, str]
    _renamings: tuple[WeightRenaming, ...]
    _converters: tuple[WeightConverter, ...]
    _prefix: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "WeightNames":
        """The names of a model's weights."""
        saved = {n: w for n, w in model.state_dict(keep_vars=True).items() if w.is_floating_point()}
        first: dict[int, str] = {}
        transforms = get_model_conversion_mapping(model)
        return cls(
            {name: first.setdefault(id(weight), name) for name, weight in saved.items()},
            tuple(t for t in transforms if isinstance(t, WeightRenaming)),
            tuple(t for t in transforms if isinstance(t, WeightConverter)),
            model.base_model_prefix,
        )

    def in_model(self, name: str) -> str | None:
        """The model's own name for what a checkpoint calls `name`; None if it has no such weight.

        What transformers makes one weight of many (fused experts) is none of them.
        """
        if name in self.first:
            return name
        renamed, piece = self._renamed(name)
        return renamed if not piece and renamed in self.first else None

    def _renamed(self, name: str) -> tuple[str, bool]:
        """A checkpoint's name by transformers' rules, and whether it is a piece of a weight."""
        renamed, converter = rename_source_key(
            name, list(self._renamings), list(self._converters), self._prefix, dict(self.first)
        )
        return renamed, converter is not None
