"""What speaks against calibration texts once their models have read them."""

import logging
from collections.abc import Mapping

from mergekit.common import ModelReference

from mergekit_dam.calibration.judgement import misfit_of
from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.host.prepare import Prepared

LOG = logging.getLogger(__name__)


def text_losses(prepared: Prepared, record: MergeRecord) -> dict[ModelReference, dict[str, float]]:
    """Losses of the next token on every model's held-out text, in nats per token.

    Returns:
        Model -> its "own" loss, and that of the "start" of the merge; empty if the model as a
        whole was not judged.
    """
    found = record.trials[0].text_losses if record.trials else ()
    pairs = zip(prepared.calibration, found, strict=False)
    return {model: {"own": own, "start": start} for model, (own, start) in pairs}


def misfits(
    prepared: Prepared, losses: Mapping[ModelReference, Mapping[str, float]], vocabulary: int
) -> dict[ModelReference, tuple[str, ...]]:
    """Texts that do not seem to be those of their models: a sentence each, which is logged too.

    Text that several models share is no model's own, and the average may know it best.

    Args:
        prepared: The texts.
        losses: What `text_losses` gives.
        vocabulary: Number of the merged model's tokens.
    """
    sources = [own.provenance.source for own in prepared.calibration.values()]
    found: dict[ModelReference, tuple[str, ...]] = {}
    for model, own in losses.items():
        if sources.count(prepared.calibration[model].provenance.source) > 1:
            continue
        said = misfit_of(own["own"], own["start"], vocabulary)
        if said is not None:
            LOG.warning("calibration of %s: %s", model, said)
            found[model] = (said,)
    return found
