"""mergekit around it all: its plan made our tasks, its executor running them, its files written.

May import: all packages below it. Start reading at `plugin`; in the order of a merge:
plugin, run                   mergekit's functions that call us; the merge around mergekit's own
references, files             what a model's name means, and where its files are
loaders, adapters             weights as they are stored; adapters merged into their bases
prepare, architectures        all that can be known before a weight is read
names, identities             names without paths; the files of a model, and their digests
synthetic                     text that models write themselves, and the memory that it takes
vocabulary                    the merged vocabulary, built by mergekit
planner, loadable, steps      mergekit's plan, and what it would leave out
merge, graph                  the merge as data; from planned tensors to tasks
headers, checks, fused        names and shapes of the tensors, from headers alone
specs, places, initial        how each tensor is fitted, where it acts, what it starts from
replay                        coefficients of an earlier merge, for the models of this one
known_graph                   tasks of a merge whose coefficients are known
fitted_graph, stages          tasks of a fit: tensors become stages, text becomes streams
gathers, tasks                the tasks themselves
artifacts, report, resolved   coefficients, and the report with all parameters
output, lock                  the folder that they go to, and its lock
resume                        what an earlier run of the same merge has kept
compat                        every name that is private to mergekit, or changes with its versions
"""
