"""What a merge will cost, said before it starts: only headers and configurations are read.

May import: host and what lies below. Start reading at `estimate.estimate`; `inventory` is what
there is to merge, `sweeps` how often the fit comes by, `flops` and `memory` what that takes.
"""
