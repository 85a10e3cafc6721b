"""The functions and the class that `mergekit_dam` offers to Python programs.

May import: everything but the commands, the demo and reproduce. `asked` reads a configuration in
any of its forms, `texts` keeps texts of the memory in files; the other modules hold the public
names.
"""
