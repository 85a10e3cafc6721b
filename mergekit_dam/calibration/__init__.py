"""Calibration text -> token sequences, one set for each model.

source      what the user wrote behind `calibration:`
files, hub  rows, read lazily from local files or a Hub dataset
documents   rows -> texts (chats through `chat`, with the model's template) or token ids
pieces      long documents cut, everything in a seeded order
packing     tokens, laid end to end into full sequences
load        these steps in a row; calibration_set is what comes out
tokenizers  each model's tokenizer, and whether those of all models agree
"""

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.calibration.sets import CalibrationSet, Provenance
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.vocabulary.tokenizers import check_agreement, load_tokenizer

__all__ = [
    "CalibrationSet",
    "CalibrationSource",
    "Provenance",
    "check_agreement",
    "load_calibration",
    "load_tokenizer",
]
