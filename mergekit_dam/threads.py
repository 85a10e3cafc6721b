"""The number of threads that a merge computes with."""

import os

import torch


def use_own_share() -> None:
    """Use as many threads as this process may use processors, unless the user has set a number.

    torch starts one for every processor of the machine. A container with a quota of two on a
    machine of 64 would have 64 that wait for each other.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    import joblib  # takes half a second

    torch.set_num_threads(max(1, min(torch.get_num_threads(), joblib.cpu_count())))
