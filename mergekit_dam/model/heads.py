"""Whether a model's output head is its embedding: by its configuration, and by its files."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.names import WeightNames


def files_untie_head(
    model: PreTrainedModel, stored: Collection[str], read: Callable[[str], Tensor]
) -> bool:
    """Whether a model has an output head of its own although its configuration ties it.

    transformers loads it so if the files hold a head that is not equal to the embedding.

    Args:
        model: the model without weights, as `build_model` makes it.
        stored: names of the tensors in its files.
        read: reads a tensor by its name.

    Raises:
        ArchitectureError: the configuration says so, but the files have no head; transformers would
            draw one at random.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return False
    tied = head.weight is embedding.weight
    names, paths = WeightNames.of(model), {id(m): path for path, m in model.named_modules()}
    in_files = {names.in_model(name): name for name in stored}
    own, shared = (in_files.get(f"{paths[id(module)]}.weight") for module in (head, embedding))
    if not tied and own is None and shared is not None:
        raise ArchitectureError(
            "its config.json says `tie_word_embeddings: false`, but its files have no output head, "
            "and transformers would draw one at random; write `true` there if the head is the "
            "embedding, or else bring the file with the head"
        )
    if not tied or own is None or shared is None:
        return False
    return not torch.equal(read(own), read(shared))
