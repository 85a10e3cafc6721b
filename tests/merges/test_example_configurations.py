"""The files in examples/configs: each is valid, and merges tiny models as it stands."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_dam.configure.draft import of_file, with_texts
from mergekit_dam.request.check import check_configuration
from mergekit_dam.request.document import single
from tests.kit.adapters import save_adapter
from tests.kit.families import LAYERS, Family
from tests.kit.merging import Merged, merge
from tests.kit.mixtures import save_mixtures
from tests.kit.processes import finish, start_merges
from tests.kit.vocabularies import Pair

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
AFTER = [name for name in FILES if name.endswith("-after")]
OURS = [name for name in FILES if not name.endswith("-before")]
SMALL = {"samples": 4, "sequence_length": 16}
OWN_LAYERS = {32: LAYERS, 4: 1}
"""Layer of a model of 7B -> that of the tiny one."""


def content(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text("utf-8")


def places(name: str, family: Family, pair: Pair, folder: Path) -> dict[str, Path]:
    """Word of a file of examples -> the tiny model or text that stands for it."""
    models, texts, base = family.models.models, family.texts, family.models.base
    if name == "experts":
        own, ids = save_mixtures("mixtral", folder)
        models, texts, base = (*own.models, own.base), (*ids, ids[0]), own.base
    if name == "tokenizer-union":
        models, texts = (*pair.models, base), (*pair.texts, texts[2])
    found = {"base": base}
    for model, text, word in zip(models, texts, ("math", "german", "code"), strict=False):
        found |= {word: model, f"{word}.jsonl": text}
    if name == "adapters":
        for seed, word in enumerate(("math", "german")):
            found[f"{word}-lora"] = save_adapter(base, folder / word, seed=seed)
    return found


def tiny(name: str, own: Mapping[str, Path]) -> dict[str, Any]:
    """The configuration with tiny models and texts, and few of their tokens."""
    text = re.sub(r"org/(\w+)-(?:7b|70b|moe)", lambda found: str(own[found[1]]), content(name))
    text = re.sub(r"org/(\w+-lora)", lambda found: str(own[found[1]]), text)
    text = re.sub(r"\./data/([\w.]+)", lambda found: str(own[found[1]]), text)
    tree: dict[str, Any] = yaml.safe_load(text)
    for entry in tree.get("slices", []):
        for source in entry["sources"]:
            source["layer_range"] = [
                OWN_LAYERS.get(layer, layer) for layer in source["layer_range"]
            ]
    given = tree.get("parameters", {})
    if "coefficients" not in given:
        descends = {} if given.get("objective") == "layer" else {"steps": 2}
        tree["parameters"] = {**given, **SMALL, **descends}
    return tree


def merged(name: str, own: Mapping[str, Path], folder: Path) -> Merged:
    configuration = tiny(name, own)
    if name == "two-machines":
        finish(start_merges({"out": configuration}, folder))
        return Merged(folder / "out")
    if name == "replay":
        configuration["parameters"]["coefficients"] = str(merged("two-models", own, folder).path)
    return merge(configuration, folder / name)


@pytest.mark.parametrize("name", OURS)
def test_the_file_passes_the_checks_of_a_merge(name: str) -> None:
    document = single(content(name))
    check_configuration(MergeConfiguration.model_validate(document.tree), document)


@pytest.mark.parametrize("name", AFTER)
def test_init_makes_the_file_after_of_the_file_before(name: str) -> None:
    after = yaml.safe_load(content(name))
    entries = after.get("models") or after["slices"][0]["sources"]
    texts = {entry["model"]: entry["parameters"]["calibration"] for entry in entries}
    before = of_file(FOLDER / f"{name.removesuffix('-after')}-before.yaml")
    assert with_texts(before, texts).tree == after


def test_every_file_is_in_the_table() -> None:
    linked = re.findall(r"\]\(([\w-]+)\.yaml\)", (FOLDER / "README.md").read_text("utf-8"))
    assert sorted(linked) == FILES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("name", OURS)
def test_the_file_merges_models(name: str, family: Family, pair: Pair, tmp_path: Path) -> None:
    found = merged(name, places(name, family, pair, tmp_path), tmp_path)
    found.load()
    report = json.loads((found.path / "dam_report.json").read_text("utf-8"))
    learned = [entry for entry in report["tensors"] if entry["outcome"].startswith("fitted")]
    assert report["replayed"] == (name == "replay")
    assert learned or name == "replay"
    if name == "replay":
        assert found.model_bytes == Merged(tmp_path / "two-models").model_bytes
