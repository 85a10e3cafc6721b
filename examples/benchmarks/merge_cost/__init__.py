"""What merges of the same models cost: the models.

settings    sizes, and what is swept
synthetic   random models of a given shape
texts       a tokenizer and calibration text for them
page_cache  models dropped from it, so that a merge has to read them from storage
"""
