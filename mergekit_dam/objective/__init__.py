"""The end-to-end objective: losses between logits, penalties of coefficients, and the descent."""
