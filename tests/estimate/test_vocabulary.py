"""Estimates for a merge of two vocabularies."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.estimate.inventory import take_inventory
from mergekit_dam.estimate.merge import plan_merge
from tests.kit.merging import merge, tensors_of
from tests.kit.models import EMBEDDING, HEAD
from tests.kit.reads import watched_reads
from tests.kit.vocabularies import Pair


@pytest.mark.parametrize(("multiple", "force"), [(1, False), (16, False), (1, True)])
@pytest.mark.parametrize("fit", [{}, {"objective": "layer+logits", "metric": "sensitivity"}])
def test_a_plan_counts_the_rows_that_will_be_written(
    pair: Pair, tmp_path: Path, fit: dict[str, Any], multiple: int, force: bool
) -> None:
    tokens = {"aci": {"source": str(pair.models[0]), "force": force}}
    tokenizer = {"source": "union", "pad_to_multiple_of": multiple, "tokens": tokens}
    configuration = pair.dam(tokenizer, **{**fit, "steps": 2} if fit else {})
    file = tmp_path / "dam.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    LoaderCache.loaders.clear()
    with watched_reads() as reads:
        found = take_inventory(plan_merge(file, MergeOptions(quiet=True), tmp_path / "out"))
    assert not reads.order
    merged = merge(configuration, tmp_path / "out")
    expected = {name: tensor.numel() for name, tensor in merged.tensors.items()}
    assert {tensor.name: tensor.parameters for tensor in found.tensors} == expected
    assert {t.name: t.written for t in found.tensors} == {n: 4 * s for n, s in expected.items()}
    sizes = [sum(own.nbytes for own in tensors_of(model).values()) for model in pair.models]
    assert sum(tensor.stored for tensor in found.tensors) == sum(sizes)
    size = merged.load().config.vocab_size
    assert found.vocabulary == size
    aligned = {tensor.name: tensor.converted for tensor in found.tensors if tensor.converted}
    copies = 4 if force else 2
    assert aligned == {EMBEDDING: copies * 4 * 16 * size, HEAD: copies * 4 * 16 * size}
