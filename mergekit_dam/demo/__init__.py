"""`mergekit-dam demo`: trains three tiny specialists, merges them and compares the merges.

May import: evaluate, errors. Start reading at `run.run_demo`; in the order of its steps:
texts, arithmetic, records   make the text of the three domains
training, muon               train a tokenizer, the base and the specialists
recipes                      writes the YAML files and calls mergekit's own command
result                       holds the losses and makes the table
"""
