"""Problems of the sources' tensors, found in their headers alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer.truncate import TruncatedVocabulary
from safetensors.torch import save_file

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.host.checks import check_headers
from mergekit_dam.parameters import NAME

Shapes = Mapping[str, Sequence[int]]
Planned = list[tuple[WeightInfo, ExecuteMergeMethodTask]]


def save(folder: Path, shapes: Shapes, *, model_type: str = "llama") -> ModelReference:
    """A checkpoint of tensors of some shapes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tensors = {name: torch.zeros(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelReference.model_validate(str(folder))


def plan(models: Sequence[ModelReference], *weights: WeightInfo) -> Planned:
    """A plan as mergekit's planner would make it."""
    planned = []
    for weight in weights:
        gather = GatherTensors(weight_info=ImmutableMap(data=dict.fromkeys(models, weight)))
        task = ExecuteMergeMethodTask(
            method_name=NAME,
            gather_tensors=gather,
            model_order=tuple(models),
            parameters={},
            input_parameters={model: {} for model in models},
            base_model=None,
            output_weight=weight,
        )
        planned.append((weight, task))
    return planned


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """Check two checkpoints, given as shapes, for weights."""

    def check(first: Shapes, second: Shapes, *weights: WeightInfo, **save_options: Any) -> Any:
        models = [
            save(tmp_path / name, shapes, **save_options)
            for name, shapes in (("a", first), ("b", second))
        ]
        return check_headers(plan(models, *weights), models)

    return check


NORM = WeightInfo(name="norm.weight")
EMBEDDING = WeightInfo(name="embed.weight", vocabulary_axis=0)


def test_tensors_that_agree_pass_and_their_shapes_are_returned(check: Any) -> None:
    shapes = {"norm.weight": [4], "embed.weight": [6, 4], "unplanned": [1]}
    found = check(shapes, {**shapes, "unplanned": [2]}, NORM, EMBEDDING)
    assert found == {"norm.weight": (4,), "embed.weight": (6, 4)}


def test_a_missing_tensor_is_named_with_its_model(check: Any, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="required the same tensors in all models") as error:
        check({"norm.weight": [4]}, {"other": [4]}, NORM)
    assert error.value.message.endswith(f"\n  - norm.weight: {tmp_path / 'b'} does not have it")


def test_an_optional_tensor_that_one_model_lacks_is_named(check: Any, tmp_path: Path) -> None:
    head = WeightInfo(name="lm_head.weight", optional=True)
    with pytest.raises(ArchitectureError) as error:
        check({"lm_head.weight": [6, 4]}, {"other": [4]}, head)
    assert (
        f"lm_head.weight: some models have it, {tmp_path / 'b'} does not have it"
        in error.value.message
    )


def test_shapes_that_differ_are_listed_by_model(check: Any, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError) as error:
        check({"norm.weight": [4]}, {"norm.weight": [5]}, NORM)
    assert error.value.message.endswith(
        f"norm.weight: shapes differ: {tmp_path / 'a'} [4], {tmp_path / 'b'} [5]"
    )


def test_vocabularies_that_differ_get_a_hint_to_align_them(check: Any) -> None:
    with pytest.raises(ArchitectureError) as error:
        check({"embed.weight": [6, 4]}, {"embed.weight": [7, 4]}, EMBEDDING)
    assert error.value.message.endswith(
        "[7, 4]; write `tokenizer: {source: union}`, or pass --unsafe-truncate-embeddings where "
        "only the padding differs"
    )


def test_the_first_five_of_many_problems_are_shown(check: Any) -> None:
    weights = [WeightInfo(name=f"w{index}") for index in range(8)]
    with pytest.raises(ArchitectureError) as error:
        check({w.name: [1] for w in weights}, {"x": [1]}, *weights)
    lines = error.value.message.splitlines()[1:]
    assert [line.split(":")[0] for line in lines[:5]] == [f"  - w{index}" for index in range(5)]
    assert lines[5:] == ["  - and 3 more"]


@pytest.mark.parametrize("by", ["aliases", "tied_names"])
def test_a_tensor_is_found_and_compared_under_its_other_names(check: Any, by: str) -> None:
    weight = WeightInfo.model_validate({"name": "norm.weight", by: ("old.norm",)})
    with pytest.raises(ArchitectureError, match="shapes differ"):
        check({"norm.weight": [4], "old.norm": [5]}, {"old.norm": [5]}, weight)


def test_tensors_that_mergekit_converts_when_loading_are_left_to_it(check: Any) -> None:
    """Experts of Mixtral, saved one by one, are fused when they are loaded."""
    experts = {
        f"model.layers.0.block_sparse_moe.experts.{index}.{name}.weight": [4, 4]
        for index in range(2)
        for name in ("w1", "w2", "w3")
    }
    weight = WeightInfo(name="model.layers.0.mlp.experts.down_proj")
    assert check(experts, experts, weight, model_type="mixtral") == {}


def test_tensors_behind_a_vocabulary_adapter_are_left_to_it(tmp_path: Path) -> None:
    models = [
        save(tmp_path / "a", {"embed.weight": [6, 4]}),
        save(tmp_path / "b", {"embed.weight": [7, 4]}),
    ]
    ((weight, task),) = plan(models, EMBEDDING)
    assert isinstance(task.gather_tensors, GatherTensors)
    adapter = TruncatedVocabulary(gather_tensors=task.gather_tensors, weight_info=weight)
    wrapped = task.model_copy(update={"gather_tensors": adapter})
    assert check_headers([(weight, wrapped)], models) == {}


def test_shapes_in_pickled_checkpoints_are_left_for_loading(tmp_path: Path) -> None:
    models = [save(tmp_path / "a", {"norm.weight": [4]})]
    (tmp_path / "b").mkdir()
    torch.save({"norm.weight": torch.zeros(5)}, tmp_path / "b" / "pytorch_model.bin")
    models.append(ModelReference.model_validate(str(tmp_path / "b")))
    assert check_headers(plan(models, NORM), models) == {"norm.weight": (4,)}
