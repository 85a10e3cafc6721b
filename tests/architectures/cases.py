"""All architectures under test: a tiny random model of each."""

from tests.architectures.case import Case
from tests.architectures.language_models import DEFINED, INFERRED
from tests.architectures.refused_models import NO_CAUSAL_DECODER, STATEFUL_BLOCKS
from tests.architectures.vision_models import VISION_MODELS

CASES: dict[str, Case] = {
    **DEFINED,
    **INFERRED,
    **VISION_MODELS,
    **STATEFUL_BLOCKS,
    **NO_CAUSAL_DECODER,
}
MERGED = [name for name, case in CASES.items() if case.refused is None]
REFUSED = [name for name, case in CASES.items() if case.refused is not None]
