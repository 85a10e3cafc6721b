"""Whether the output head is the embedding, as transformers loads the model."""

import pytest
import torch

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.build import build_model
from mergekit_dam.model.heads import files_untie_head
from tests.kit.models import EMBEDDING, HEAD, tiny_llama_config

ONE, OTHER = torch.ones(3, 2), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("tied", "stored", "untied"),
    [
        (False, {EMBEDDING: ONE, HEAD: OTHER}, False),
        (False, {EMBEDDING: ONE, HEAD: ONE}, False),
        (True, {EMBEDDING: ONE, HEAD: OTHER}, True),
        (True, {EMBEDDING: ONE, HEAD: ONE}, False),
        (True, {EMBEDDING: ONE}, False),
        (True, {HEAD: ONE}, False),
    ],
)
def test_files_untie_a_head_that_is_another_than_the_embedding(
    tied: bool, stored: dict[str, torch.Tensor], untied: bool
) -> None:
    model = build_model(tiny_llama_config(tie_word_embeddings=tied))
    assert files_untie_head(model, stored, stored.__getitem__) == untied


def test_a_head_that_is_missing_is_refused() -> None:
    model = build_model(tiny_llama_config(tie_word_embeddings=False))
    with pytest.raises(ArchitectureError, match="no output head"):
        files_untie_head(model, {EMBEDDING: ONE}, {EMBEDDING: ONE}.__getitem__)
