"""Names of a model's weights: in its modules and in checkpoints, and the blocks they belong to."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from mergekit_dam.model.compat import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)


@dataclass(frozen=True)
class WeightNames:
    """The names of a model's weights: its parameters, and the buffers that it saves.

    Attributes:
        first: Every name -> the first name of the same weight (tied weights have several).
        blocks: Path of the list of decoder blocks.
    """

    first: dict[str, str]
    blocks: str
    _renamings: tuple[WeightRenaming, ...]
    _converters: tuple[WeightConverter, ...]
    _prefix: str

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: str = "") -> "WeightNames":
        """The names of a model's weights, whose decoder blocks are in the list `blocks`."""
        saved = {n: w for n, w in model.state_dict(keep_vars=True).items() if w.is_floating_point()}
        first: dict[int, str] = {}
        transforms = get_model_conversion_mapping(model)
        return cls(
            {name: first.setdefault(id(weight), name) for name, weight in saved.items()},
            blocks,
            tuple(t for t in transforms if isinstance(t, WeightRenaming)),
            tuple(t for t in transforms if isinstance(t, WeightConverter)),
            model.base_model_prefix,
        )

    def in_model(self, name: str) -> str | None:
        """The model's name of the weight that a checkpoint calls `name`; None if it has none.

        A piece of a fused weight (such as one expert's) has no name of its own in the model.
        """
        if name in self.first:
            return name
        renamed, piece = self._renamed(name)
        return renamed if not piece and renamed in self.first else None

    def canonical(self, name: str) -> str | None:
        """The first name of a weight in the model; None if the model has no such weight."""
        found = self.in_model(name)
        return None if found is None else self.first[found]

    def block_of(self, name: str) -> int | None:
        """Index of the block that a parameter belongs to, or None."""
        prefix = f"{self.blocks}."
        if not name.startswith(prefix):
            return None
        index = name[len(prefix) :].split(".", 1)[0]
        return int(index) if index.isdigit() else None

    def block_name(self, index: int) -> str:
        """Prefix of the names of a block's parameters, without the trailing dot."""
        return f"{self.blocks}.{index}"

    def _renamed(self, name: str) -> tuple[str, bool]:
        """A name after transformers' renaming, and whether it is a piece of a fused weight."""
        renamed, converter = rename_source_key(
            name, list(self._renamings), list(self._converters), self._prefix, dict(self.first)
        )
        return renamed, converter is not None
