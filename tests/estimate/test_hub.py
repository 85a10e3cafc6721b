"""A plan of models on the Hub reads headers there, and downloads no weights."""

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.kit.hub import Hub, local_hub
from tests.kit.merging import dam
from tests.kit.models import Models, loaded, save_models, tiny_llama_config
from tests.kit.quantised import packed
from tests.kit.texts import Calibration

IDS = ("org/one", "org/two")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Models whose weights are much larger than their headers; the second one is in shards."""
    folder = tmp_path_factory.mktemp("sharded")
    models = save_models(folder, tiny_llama_config(intermediate_size=4096), count=2)
    model = loaded(models.models[1])
    (models.models[1] / "model.safetensors").unlink()
    model.save_pretrained(models.models[1], max_shard_size="700KB")
    assert len(list(models.models[1].glob("*.safetensors"))) > 1
    return models


@pytest.fixture
def hub(sharded: Models) -> Iterator[Hub]:
    with local_hub(dict(zip(IDS, sharded.models, strict=True))) as hub:
        yield hub


def inventory(
    folder: Path, names: tuple[str, ...], text: Calibration, environment: Mapping[str, str]
) -> str:
    """What a process of its own prints of the plan of a merge."""
    file = folder / "dam.yaml"
    file.write_text(yaml.safe_dump(dam(list(map(Path, names)), text)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.inventories", str(file)],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, said in zip(names, IDS, strict=True):
        done.stdout = done.stdout.replace(name, said)
    return done.stdout


def header_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the header of every file of weights, with its length."""
    return {
        file.name: 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        for file in folder.glob("*.safetensors")
    }


def test_the_plan_is_that_of_the_folders_and_reads_headers_alone(
    hub: Hub, sharded: Models, calibration: Calibration, tmp_path: Path
) -> None:
    found = inventory(tmp_path, IDS, calibration, hub.environment(tmp_path / "home"))
    local = tuple(map(str, sharded.models))
    assert found == inventory(tmp_path, local, calibration, os.environ)
    for name, folder in hub.models.items():
        headers = header_bytes(folder)
        sent = {file: count for (model, file), count in hub.sent.items() if model == name}
        assert {file: sent.pop(file) for file in headers} == headers
        for file, count in sent.items():  # configuration, tokenizer, index
            assert count <= (folder / file).stat().st_size
        assert sum(headers.values()) < 0.02 * sum(
            (folder / file).stat().st_size for file in headers
        )
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_model_that_was_downloaded_is_taken_from_the_cache(
    hub: Hub, calibration: Calibration, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path / "home")
    first = inventory(tmp_path, IDS, calibration, environment)
    download(environment)
    hub.sent.clear()
    assert inventory(tmp_path, IDS, calibration, environment) == first
    assert not hub.sent
    assert inventory(tmp_path, IDS, calibration, {**environment, "HF_HUB_OFFLINE": "1"}) == first


def test_a_quantised_model_on_the_hub_has_the_sizes_of_the_weights_that_it_stands_for(
    sharded: Models, calibration: Calibration, tmp_path: Path
) -> None:
    stored = packed(
        sharded.models[0], tmp_path / "int4", ignore=("lm_head",), num_bits=4, strategy="channel"
    )
    models = (stored, sharded.models[1])
    with local_hub(dict(zip(IDS, models, strict=True))) as hub:
        environment = hub.environment(tmp_path / "home")
        found = inventory(tmp_path, IDS, calibration, environment)
        assert hub.sent[IDS[0], "model.safetensors"] == header_bytes(stored)["model.safetensors"]
        download(environment)
        downloaded = inventory(tmp_path, IDS, calibration, environment)
    here = inventory(tmp_path, tuple(map(str, models)), calibration, os.environ)
    plain = inventory(tmp_path, tuple(map(str, sharded.models)), calibration, os.environ)
    assert downloaded == here
    assert parameters(found) == parameters(here) == parameters(plain) != []


def parameters(inventory: str) -> list[str]:
    """Number of elements of every tensor of an inventory."""
    return re.findall(r"name='[^']*', parameters=\d+", inventory)


def download(environment: Mapping[str, str]) -> None:
    """Bring both models to the cache of an environment."""
    program = (
        "import sys, huggingface_hub\nfor i in sys.argv[1:]: huggingface_hub.snapshot_download(i)"
    )
    subprocess.run([sys.executable, "-c", program, *IDS], env=dict(environment), check=True)
