"""Short names of models and modules, and places of tensors."""

import pytest

from mergekit_dam.reports.names import Place, module_labels, place_of, ranges, short_names


def test_models_are_named_by_the_end_of_their_paths() -> None:
    named = short_names(["/models/a/python", "org/math", "/models/a/base"])
    assert list(named.values()) == ["python", "math", "base"]


def test_equal_ends_are_told_apart_by_what_stands_before() -> None:
    named = short_names(["/x/first/model", "/x/second/model", "/y/third/other"])
    assert list(named.values()) == ["first/model", "second/model", "other"]


def test_a_path_that_ends_another_keeps_its_whole_name() -> None:
    named = short_names(["a/model", "model"])
    assert list(named.values()) == ["a/model", "model"]


def test_an_adapter_is_named_with_its_model() -> None:
    assert short_names(["/m/base+/l/adapter"]) == {"/m/base+/l/adapter": "base+adapter"}


def test_no_two_names_are_equal() -> None:
    sources = ["a/b/c", "b/c", "c", "x/b/c", "a/b/d", r"C:\models\c"]
    named = short_names(sources)
    assert len(set(named.values())) == len(sources)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", Place("model.layers", 3, "mlp.up_proj")),
        ("model.layers.3.self_attn.q_proj.bias", Place("model.layers", 3, "self_attn.q_proj.bias")),
        ("transformer.h.11.ln_1.weight", Place("transformer.h", 11, "ln_1")),
        (
            "model.layers.0.mlp.experts.17.w1.weight",
            Place("model.layers", 0, "mlp.experts.*.w1"),
        ),
        ("visual.blocks.2.attn.qkv.weight", Place("visual.blocks", 2, "attn.qkv")),
        ("lm_head.weight", None),
    ],
)
def test_a_tensor_has_a_place(name: str, place: Place | None) -> None:
    assert place_of(name) == place


def test_labels_are_short_and_differ() -> None:
    modules = ["self_attn.q_proj", "post_attention_layernorm", "attn.out", "mlp.out"]
    assert module_labels(modules) == {
        "self_attn.q_proj": "q_proj",
        "post_attention_layernorm": "post_attn_norm",
        "attn.out": "attn.out",
        "mlp.out": "mlp.out",
    }


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([], ""), ([4], "4"), ([0, 1, 2, 3], "0–3"), ([0, 1, 5, 7, 8], "0–1, 5, 7–8")],  # noqa: RUF001
)
def test_numbers_are_said_as_ranges(numbers: list[int], said: str) -> None:
    assert ranges(numbers) == said
