"""Teachers parts of which put out zeros, as blocks that were added to a model do at first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mergekit_dam.reports.page import PAGE_NAME
from tests.kit.merging import dam, merge, one_sweep_and_a_search, tensors_of
from tests.kit.models import save_models, tiny_llama_config
from tests.kit.texts import Calibration

BLOCK = ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")


def silence(models: Sequence[Path], *names: str) -> None:
    """Set weights of models to 0."""
    for model in models:
        file = model / "model.safetensors"
        tensors = load_file(file)
        for name in names:
            tensors[name].zero_()
        save_file(tensors, file, {"format": "pt"})


@one_sweep_and_a_search
@pytest.mark.parametrize(
    "names",
    [
        BLOCK,
        ("model.layers.0.self_attn.v_proj.weight",),
        ("model.embed_tokens.weight",),
        ("model.norm.weight",),
    ],
    ids=["block", "values", "embedding", "final norm"],
)
@pytest.mark.parametrize("which", [slice(1), slice(2)], ids=["one", "both"])
def test_losses_stay_fractions(
    names: tuple[str, ...],
    which: slice,
    own: dict[str, Any],
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    models = save_models(tmp_path, tiny_llama_config())
    silence(models.models[which], *names)
    configuration = dam(
        [*models.models, models.base],
        [*calibration, calibration[0]],
        base=models.base,
        include_base=True,
        **own,
    )
    out = merge(configuration, tmp_path / "out")
    assert (out.path / PAGE_NAME).is_file()
    losses = [tensor.get("held_out_start") for tensor in out.report["tensors"]]
    assert 0 < max(loss for loss in losses if loss is not None) < 1e4


def test_a_silent_block_of_one_model_leaves_the_block_of_the_other(
    calibration: Calibration, tmp_path: Path
) -> None:
    models = save_models(tmp_path, tiny_llama_config())
    silence(models.models[:1], *BLOCK)
    configuration = dam(
        models.models,
        calibration,
        objective="layer",
        metric="identity",
        correction="none",
        ridge=1e-4,
    )
    merged = merge(configuration, tmp_path / "out").load().state_dict()
    speaking = tensors_of(models.models[1])
    for name in BLOCK:
        share = (merged[name] * speaking[name]).sum() / speaking[name].square().sum()
        assert 0.2 < float(share) < 0.8
