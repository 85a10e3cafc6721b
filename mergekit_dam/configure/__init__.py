"""Configurations that are written for the user, from names and texts or from another method's.

May import: request and what lies below. Start reading at `draft`; `convert` turns a configuration
of any method into one of dam and says what changes, `text` writes it with comments.
"""
