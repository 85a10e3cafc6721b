"""`mergekit-dam demo`: three tiny specialists made on the spot, merged and compared.

May import: evaluate, errors. Start reading at `run.run_demo`; in the order of its steps:
texts, arithmetic, records   the three domains
training, muon               a tokenizer, the base and the specialists
recipes                      the YAML files, and mergekit's own command
result                       the table
"""
