"""A folder with models, texts and a configuration of relative paths, merged by mergekit-yaml."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_dam.host import plugin
from tests.kit.merging import Merged, dam
from tests.kit.models import Models
from tests.kit.texts import Calibration

FITS: dict[str, dict[str, Any]] = {
    "layer": {"objective": "layer", "metric": "identity", "correction": "low_rank"},
    "layer+logits": {
        "objective": "layer+logits",
        "metric": "sensitivity",
        "correction": "low_rank",
        "correction_rank": 4,
        "steps": 2,
    },
}


@dataclass(frozen=True)
class Project:
    """The folder of a merge, with `models/`, `texts/` and `dam.yaml`."""

    root: Path

    @property
    def out(self) -> Merged:
        return Merged(self.root / "out")

    def merge(self, monkeypatch: pytest.MonkeyPatch, out: str = "out", **parameters: Any) -> Merged:
        """Run mergekit-yaml in the folder, as a user would."""
        if parameters:
            self.configure(parameters)
        LoaderCache.loaders.clear()
        monkeypatch.chdir(self.root)
        plugin.install()
        done = CliRunner().invoke(mergekit_yaml, ["dam.yaml", out, "--quiet"])
        assert done.exit_code == 0, done.output
        return Merged(self.root / out)

    def configure(self, parameters: Mapping[str, Any]) -> None:
        texts = [f"texts/calibration_{index}.jsonl" for index in (0, 1)]
        models = [Path(f"models/model_{index}") for index in (0, 1)]
        configuration = dam(models, texts, base=Path("models/base"), **parameters)
        (self.root / "dam.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")


def save_project(root: Path, models: Models, texts: Calibration) -> Project:
    """A project of models and texts that are copied there."""
    for folder in (models.base, *models.models):
        shutil.copytree(folder, root / "models" / folder.name)
    for text in texts:
        (root / "texts").mkdir(exist_ok=True)
        shutil.copy(text, root / "texts")
    return Project(root)
