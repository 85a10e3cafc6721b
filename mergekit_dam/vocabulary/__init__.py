"""Tokenizers of the models, and the vocabulary of the merged one.

May import: errors. Start reading at `merged.Vocabulary`: `translation` brings a model's token ids
into it, `tokenizers` checks that models agree where there is none.
"""
