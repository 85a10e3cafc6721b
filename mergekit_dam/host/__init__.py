"""Integration with mergekit: turns its plan into tasks that its executor runs; writes files.

May import: all packages but `estimate` and `demo`. Start reading at `plugin`, then `run`, `planner`
and `graph`. Only `compat` has names that are private to mergekit or change with its versions.
"""
