"""A package, so that no other distribution's stray `tests` can take its name."""
