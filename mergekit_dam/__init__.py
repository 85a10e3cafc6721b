"""Differentiable Adaptive Merging (arXiv 2410.08371) as a merge method of mergekit."""

__version__ = "0.1.0"
