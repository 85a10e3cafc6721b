"""Losses, KL, speed and memory of a merge, followed while it runs in TensorBoard or W&B.

May import: the display and what stands below. Start reading at `choose.tracking`:
choose        the backend that a configuration asks for, opened and closed
backend       what a backend does
tracker       what a merge tells, as numbers for a backend
tensorboard   the backend TensorBoard
wandb         the backend Weights & Biases
"""
