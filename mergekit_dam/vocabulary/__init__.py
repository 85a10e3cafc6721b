"""Tokenizers of the models, and the vocabulary of the merged model.

May import: errors. Start reading at `merged.Vocabulary`. `translation` turns a model's token ids
into ids of that vocabulary; `tokenizers` checks that the models agree if there is none.
"""
