"""From calibration text to token sequences, one set per model.

May import: errors. Start reading at `load.load_calibration`; in the order of processing:
source, entries, mixture     parse the value of `calibration:`, and say what is wrong with it
folders, files, values,
columnar, hub, suffixes      find files, and read rows lazily from them or from a Hub dataset
formats, pairs, messages,
tokens                       turn the columns of a row into a text, a chat or token ids
templates, turns             write chats as text, with the model's template; find answers in it
reading, documents, tally    put these together for one source, and count what is left out
pieces                       cuts long documents, and shuffles all pieces with a seed
synthetic                    has a model write text itself, where there is none
packing                      tokenises the pieces and packs them end to end into full sequences
judgement, overlap           what speaks against a text, and whether it judges what it made
sets, combining              hold the result and its origin; several sources become one set
"""
