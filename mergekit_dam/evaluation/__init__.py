"""Held-out losses of models: the numbers by which merges are compared.

May import: host and what lies below. Start reading at `evaluation.evaluate`; in the order of an
evaluation:
settings, texts     what is measured; texts -> tokens, as calibration text is read
sources, parts      a model's weights, one part at a time; losses by running part after part
whole               the same for a model that cannot run in parts, and for one that is loaded
losses              means, paired differences and recovery, with standard errors
tables, conditions  what is shown, and whether a condition of the user holds
average, tasks      the plain average of some models; benchmarks of lm-eval
"""
