"""A model in parts: its input, one block, or its output run by itself, and what a part is made of.

May import: errors. Start reading at `part.Part`; `probe.make_decoder` builds what runs it, and
`anatomy.examine` finds its linears, norms and writers. Only `compat` knows transformers' insides.
"""
