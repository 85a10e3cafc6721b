"""Code that the benchmarks of this folder share.

options     the options that their command lines share
models      the models to merge; adapters are merged into their base first
merges      a merge as a mergekit configuration, and the command that runs it
selection   the rows of a table that a user asks for
processes   a command run and measured in a process of its own
machine     the machine, the packages and the command, for a report
tables      numbers and tables as Markdown
"""
