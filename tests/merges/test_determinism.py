"""The same merge gives the same bytes, and another seed takes other text."""

from pathlib import Path
from typing import Any
from unittest import mock

from mergekit_dam.streams import storage
from tests.kit.merging import Merged, merge


class TestDeterminism:
    def test_two_runs_give_the_same_bytes(
        self, merged: Merged, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        again = merge(configuration, tmp_path / "out")
        assert again.model_bytes == merged.model_bytes
        assert again.coefficient_bytes == merged.coefficient_bytes

    def test_another_seed_takes_other_text(
        self, merged: Merged, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        parameters = {**configuration["parameters"], "head": False, "seed": 1}
        again = merge({**configuration, "parameters": parameters}, tmp_path / "a")
        assert again.model_bytes != merged.model_bytes
        parameters = {**configuration["parameters"], "head": False}
        by_option = merge(
            {**configuration, "parameters": parameters}, tmp_path / "b", random_seed=1
        )
        assert by_option.model_bytes == again.model_bytes

    def test_it_does_not_matter_whether_outputs_of_units_are_kept(
        self, configuration: dict[str, Any], tmp_path: Path
    ) -> None:
        """In half precision, too: what follows a unit is rounded as if the unit had run."""
        own = {**configuration["parameters"], "forward_dtype": "bfloat16", "head": False}
        merges = []
        for room in (True, False):
            with mock.patch.object(storage, "has_room", return_value=room):
                merges.append(merge({**configuration, "parameters": own}, tmp_path / str(room)))
        assert merges[0].model_bytes == merges[1].model_bytes
