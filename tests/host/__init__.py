"""TODO tests/host/__init__.py."""
