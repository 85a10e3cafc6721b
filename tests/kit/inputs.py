"""Inputs of a merge, which a test spoils."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from mergekit_dam.errors import DamError
from tests.kit.merging import dam, merge
from tests.kit.models import make_model
from tests.kit.reads import watched_reads
from tests.kit.tokenizers import make_tokenizer


@dataclass
class Inputs:
    """Inputs of a merge that are right, until a test changes one of them.

    Attributes:
        folder: folder to write into.
        models, base, texts: paths for the configuration.
        options: mergekit's options.
    """

    folder: Path
    models: list[Path]
    base: Path
    texts: list[Any]
    options: dict[str, Any] = field(default_factory=dict)

    def configuration(self, **parameters: Any) -> dict[str, Any]:
        return dam(self.models, self.texts, **{"head": False, **parameters})

    def text(self, content: str, name: str = "text.jsonl") -> Path:
        """Write a file for the first model, and take it for its calibration."""
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        self.texts[0] = path
        return path

    def own_model(self, index: int = 1) -> Path:
        """A copy of a model, to be changed."""
        copy = self.folder / f"own_{index}"
        shutil.copytree(self.models[index], copy)
        self.models[index] = copy
        return copy

    def other_model(self, config: PretrainedConfig, index: int = 1) -> Path:
        """Another model in the place of one."""
        self.models[index] = self.folder / "other"
        make_model(config).save_pretrained(self.models[index])
        make_tokenizer().save_pretrained(self.models[index])
        return self.models[index]

    def refused(
        self, kind: type[DamError], *messages: str, configuration: dict[str, Any] | None = None
    ) -> None:
        """Assert how the merge fails: before a weight is read, and with no folder left."""
        out = self.folder / "out"
        with watched_reads() as reads, pytest.raises(kind) as error:
            merge(configuration or self.configuration(), out, **self.options)
        assert type(error.value) is kind
        for message in messages:
            assert message in error.value.message
        assert reads.order == []
        assert not out.exists()
