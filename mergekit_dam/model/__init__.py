"""A model in parts: its input, one block or its output runs by itself, and its structure is found.

May import: errors. Start reading at `part.Part`. `probe.make_decoder` builds the decoder that runs
a part, and `anatomy.examine` finds its linears, norms and writers. Only `compat` imports private
names of transformers.
"""
