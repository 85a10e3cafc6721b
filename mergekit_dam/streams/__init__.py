"""Calibration data on its way: hidden states, where they are kept, which process has them.

May import: parameters, errors. Start reading at `stream.Stream`; `share` says whose sequences are
whose, `storage` where they lie, `distributed` adds up over processes.
"""
