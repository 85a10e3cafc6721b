"""mergekit around it all: its plan made our tasks, its executor running them, its files written.

May import: all packages but `estimate` and `demo`. Start reading at `plugin`, then `run`, `planner`
and `graph`. Only `compat` names what is private to mergekit, or changes with its versions.
"""
