"""A merge keeps one block of all models in memory, however deep they are."""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from mergekit_dam.layers import sweep
from mergekit_dam.layers.fit import fit_stage
from mergekit_dam.sources.stage import OpenStage
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.reads import Reads, watched_reads
from tests.kit.texts import save_calibration

MODELS = 2
BASE = 1


def bytes_of(folder: Path, *parts: str) -> int:
    """Bytes of the tensors of a saved model whose names begin with one of `parts`."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in tensors_of(folder).items()
        if name.startswith(parts)
    )


def merge_watched(folder: Path, layers: int, *, replayed: bool = False) -> tuple[Models, Reads]:
    """Reads of a merge of models with so many layers."""
    models = save_models(folder, tiny_llama_config(num_hidden_layers=layers), count=MODELS)
    text = save_calibration(folder / "text.jsonl")
    configuration = dam(models.models, [text] * MODELS, base=models.base, head=False, samples=2)
    if replayed:
        merge(configuration, folder / "first")
        configuration = dam(models.models, base=models.base, coefficients=str(folder / "first"))
    with watched_reads() as reads:
        merge(configuration, folder / "out")
    return models, reads


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, Reads]:
    return merge_watched(tmp_path_factory.mktemp("deep"), 12)


def test_every_tensor_of_every_model_is_read_once(deep: tuple[Models, Reads]) -> None:
    models, reads = deep
    folders = [*models.models, models.base]
    expected = {(str(folder), name): 1 for folder in folders for name in tensors_of(folder)}
    assert Counter(reads.order) == expected


def test_blocks_are_read_in_the_order_of_the_data(deep: tuple[Models, Reads]) -> None:
    _, reads = deep
    layers = [int(name.split(".")[2]) for _, name in reads.order if ".layers." in name]
    assert layers == sorted(layers)
    assert reads.order[0][1] == "model.embed_tokens.weight"


def test_no_source_weight_outlives_the_merge(deep: tuple[Models, Reads]) -> None:
    assert deep[1].live == 0


@pytest.mark.parametrize("layers", [1, 6, 12])
def test_at_most_one_part_of_all_models_is_in_memory(tmp_path: Path, layers: int) -> None:
    models, reads = merge_watched(tmp_path, layers)
    parts = (
        bytes_of(models.base, "model.embed_tokens"),
        bytes_of(models.base, "model.layers.0."),
        bytes_of(models.base, "model.norm", "lm_head"),
    )
    assert reads.peak == (MODELS + BASE) * max(parts)


def test_a_replay_holds_one_tensor_of_all_models(tmp_path: Path) -> None:
    models, reads = merge_watched(tmp_path, 2, replayed=True)
    largest = max(tensor.nbytes for tensor in tensors_of(models.base).values())
    assert reads.peak == (MODELS + BASE) * largest
    assert set(Counter(reads.order).values()) == {1}


@pytest.mark.slow
def test_nothing_but_coefficients_grows_with_depth(tmp_path: Path) -> None:
    """All tensors of the process, whoever made them: merged ones leave with their shard."""
    rest = []
    for layers in (6, 18):
        folder = tmp_path / str(layers)
        models = save_models(folder, tiny_llama_config(num_hidden_layers=layers), count=MODELS)
        text = save_calibration(folder / "text.jsonl")
        configuration = dam(models.models, [text] * MODELS, head=False, samples=2)
        block = bytes_of(models.base, "model.layers.0.")
        with peak_of_all_tensors() as peak:
            merged = merge(configuration, folder / "out", out_shard_size=block)
        coefficients = merged.coefficients.coefficients.values()
        rest.append(peak.bytes - sum(rows.nbytes for rows in coefficients))
        assert len(list(merged.path.glob("model-*.safetensors"))) > layers / 2
    assert rest[1] - rest[0] < block, rest


@dataclass
class Peak:
    bytes: int = 0


@contextlib.contextmanager
def peak_of_all_tensors() -> Iterator[Peak]:
    """The most memory that tensors hold at the end of the last blocks, over that before."""

    def held() -> int:
        gc.collect()
        storages = {}
        for value in gc.get_objects():
            if issubclass(type(value), Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    before, peak, stock = held(), Peak(), fit_stage

    def watched(opened: OpenStage, *args: Any, **kwargs: Any) -> Any:
        result = stock(opened, *args, **kwargs)
        stage = opened.stage
        if stage.kind == "block" and stage.index >= len(stage.models.output.blocks) - 2:
            peak.bytes = max(peak.bytes, held() - before)
        return result

    with mock.patch.object(sweep, "fit_stage", watched):
        yield peak
