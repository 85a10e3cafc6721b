"""From calibration text to token sequences, one set per model.

May import: errors. Start reading at `load.load_calibration`; in the order of processing:
source       parses the value of `calibration:`
files, hub   read rows lazily from local files or a Hub dataset
documents    turns rows into texts (chats with the model's template) or token ids
pieces       cuts long documents, and shuffles all pieces with a seed
packing      tokenises the pieces and packs them end to end into full sequences
sets         holds the result and its origin
"""
