"""A merge on a GPU is made again from its lock."""

from pathlib import Path

import pytest
import torch

from mergekit_dam.lock.schema import read_lock
from mergekit_dam.reproduce.reproduce import reproduce
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.projects import FITS
from tests.kit.texts import Calibration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("fit", FITS)
def test_replayed_and_fitted_again_it_has_the_same_bytes(
    models: Models, texts: Calibration, gpu: torch.device, tmp_path: Path, fit: str
) -> None:
    configuration = dam(
        models.models, texts, base=models.base, **{"samples": 8, "sequence_length": 32, **FITS[fit]}
    )
    merged = merge(configuration, tmp_path / "out", device=str(gpu))
    assert read_lock(merged.path).computed_on["device"] == "cuda"
    given = [str(models.base.parent), str(texts[0].parent)]
    for refit in (False, True):
        found = reproduce(merged.path, refit=refit, given=given, quiet=True)
        assert not found.differences, str(found)
