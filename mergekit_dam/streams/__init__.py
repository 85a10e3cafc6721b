"""Calibration data during a merge: hidden states, their storage, and their processes.

May import: parameters, errors. Start reading at `stream.Stream`. `share` assigns sequences to
processes, `storage` keeps hidden states, and `distributed` adds up over processes.
"""
