"""Calibration text made token sequences, one set for each model.

May import: errors. Start reading at `load.load_calibration`; in the order of the data:
source       what the user wrote behind `calibration:`
files, hub   rows, read lazily from local files or a Hub dataset
documents    rows made texts (chats by the model's template) or token ids
pieces       long documents cut, everything in a seeded order
packing      tokens, laid end to end into full sequences
sets         the result, with where it came from
"""
