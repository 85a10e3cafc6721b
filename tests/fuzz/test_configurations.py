"""YAML of any content is refused in our words, or it is a configuration."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.configure.draft import of_file
from mergekit_dam.configure.text import written
from mergekit_dam.evaluation.average import of_configuration
from mergekit_dam.host.plugin import install
from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.early import early_problems
from mergekit_dam.request.help import OWNERS
from mergekit_dam.request.reading import read_configuration, refuse_unreadable
from tests.kit.damage import changed, damaged, deep, values
from tests.kit.guard import guarded

pytestmark = pytest.mark.slow

TREE: dict[str, Any] = {
    "merge_method": "dam",
    "base_model": "org/base",
    "models": [
        {"model": "org/a", "parameters": {"calibration": "org/text:split=train", "weight": 1.0}},
        {
            "model": {"model": {"path": "org/b", "revision": "main"}, "lora": "org/lora"},
            "parameters": {"calibration": ["a/b", "c/d:share=0.5"], "loss_weight": 2},
        },
    ],
    "parameters": {
        "samples": 4,
        "ridge": [0.1, {"filter": "mlp", "value": 0.5}],
        "objective": "layer",
        "metric": "identity",
        "gpu_memory": "12GB",
        "seed": 1,
    },
    "dtype": "bfloat16",
    "tokenizer": {"source": "union", "tokens": {"<s>": {"source": "org/a"}}},
}
SLICED: dict[str, Any] = {
    "merge_method": "dam",
    "slices": [
        {
            "sources": [
                {
                    "model": name,
                    "layer_range": [0, 2],
                    "parameters": {"calibration": "org/text", "weight": 0.5},
                }
                for name in ("org/a", "org/b")
            ],
            "parameters": {"ridge": 0.1},
        }
    ],
    "parameters": {"samples": 4},
    "chat_template": "auto",
}
TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [
        {"model": "org/a", "parameters": {"weight": 0.5, "density": [0.1, 0.9]}},
        {"model": "org/b", "parameters": {"weight": {"filter": "mlp", "value": 1}}},
    ],
    "parameters": {"normalize": True, "int8_mask": True},
}

_TAGS = """
int float bool null str binary timestamp set omap pairs seq map merge value
python/object/apply:os.system python/name:os.system
"""
_PIECES = """
- : ? [ ] { } , # & * ! | > ' " % @ ` << = ~ a: 0x1 1_0 1:2 2026-13-45 .inf &a *a --- ...
"""
TAGS = st.sampled_from(_TAGS.split()).map(lambda tag: f"!!{tag}")
PIECES = st.sampled_from(
    [*_PIECES.split(), "\t", "\n", "  ", "\u2028", "\x00", "\ufeff", "\x85", "9" * 5000]
)


def text_of(tree: Any) -> bytes:
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return json.dumps(tree).encode()


contents = st.one_of(
    changed(TREE).map(text_of),
    changed(SLICED).map(text_of),
    changed(TIES).map(text_of),
    values.map(text_of),
    damaged(text_of(TREE)),
    damaged(text_of(SLICED)),
    deep.map(str.encode),
    st.lists(st.one_of(PIECES, TAGS, st.text(max_size=4)), max_size=20).map(
        lambda own: b"merge_method: dam\n" + " ".join(own).encode(errors="surrogatepass")
    ),
    st.tuples(TAGS, st.text(max_size=6) | st.sampled_from(["", "x", "[a]", "{a: b}"])).map(
        lambda own: f"merge_method: dam\nmodels: {own[0]} {own[1]}\n".encode(errors="replace")
    ),
    st.sampled_from(["utf-16", "utf-32", "utf-8-sig"]).map(text_of(TREE).decode().encode),
    st.binary(max_size=64),
)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    install()


@given(content=contents)
def test_a_configuration(content: bytes) -> None:
    with guarded() as folder:
        file = folder / "dam.yaml"
        file.write_bytes(content)
        early_problems(file)
        refuse_unreadable(file, several=True)
        config, document = read_configuration(file)
        check_configuration(config, document)


@given(content=contents)
def test_a_configuration_to_start_from(content: bytes) -> None:
    with guarded() as folder:
        (folder / "other.yaml").write_bytes(content)
        found = of_file(folder / "other.yaml")
        written(found.tree, [])


@given(content=contents)
def test_a_configuration_to_average(content: bytes) -> None:
    with guarded() as folder:
        (folder / "dam.yaml").write_bytes(content)
        assert isinstance(of_configuration(folder / "dam.yaml"), Mapping)


@given(name=st.sampled_from(sorted(OWNERS)), value=values)
def test_a_parameter_of_any_value(name: str, value: Any) -> None:
    own = {**TREE, "parameters": {**TREE["parameters"], name: value}}
    with guarded() as folder:
        (folder / "dam.yaml").write_bytes(text_of(own))
        config, document = read_configuration(folder / "dam.yaml")
        check_configuration(config, document)
