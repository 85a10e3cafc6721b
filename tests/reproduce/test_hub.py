"""Models of the Hub stand in a lock by repository and commit, and are taken at that commit."""

import json
from pathlib import Path

import pytest
import yaml

from mergekit_dam.lock.schema import read_lock
from tests.kit.hub import COMMIT, local_hub, run_command
from tests.kit.merging import dam
from tests.kit.models import Models
from tests.kit.texts import Calibration

IDS = ("org/one", "org/two")


@pytest.mark.slow
def test_a_merge_of_repositories_is_reproduced_at_their_commits(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    configuration = dam([Path(own) for own in IDS], calibration)
    (tmp_path / "dam.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    with local_hub(dict(zip(IDS, llama_models.models, strict=True))) as hub:
        environment = hub.environment(tmp_path / "cache")
        run_command(environment, tmp_path, "merge", "dam.yaml", "out", "--quiet")
        lock = read_lock(tmp_path / "out")
        for source, name in zip(lock.sources, IDS, strict=True):
            assert (source.name, source.model.repository, source.model.revision) == (
                name,
                name,
                COMMIT,
            )
            assert source.model.files.keys() >= {"model.safetensors", "tokenizer.json"}
        fresh = hub.environment(tmp_path / "other cache")  # it downloads them again
        told = json.loads(run_command(fresh, tmp_path, "reproduce", "out", "--json"))
        assert told["byte_identical"]
        size = (llama_models.models[0] / "model.safetensors").stat().st_size
        assert hub.sent[IDS[0], "model.safetensors"] == 2 * size
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    told = json.loads(run_command(offline, tmp_path, "reproduce", "out", "--refit", "--json"))
    assert told["byte_identical"]
