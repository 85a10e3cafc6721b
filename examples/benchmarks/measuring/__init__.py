"""What the benchmarks of this folder have in common.

options     pieces of their command lines
models      what is merged; adapters merged into their base first
merges      a merge as a mergekit configuration, and the command that runs it
rows        which rows of a table a user asks for
processes   a command run and measured in a process of its own
machine     where that was, and with which packages
tables      numbers and tables as Markdown
"""
