"""The README for a package index, where links that are relative to the repository lead nowhere."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)(?=[^)\s]+\))")
"""Where the target of a link to a file of the repository begins."""


class ReadmeHook(MetadataHookInterface):
    """Makes links to files of the repository absolute, at the tag of this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`, which pyproject.toml leaves to this hook."""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        place = f"{metadata['urls']['Repository']}/blob/v{metadata['version']}/"
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": _RELATIVE.sub(place, text),
        }
