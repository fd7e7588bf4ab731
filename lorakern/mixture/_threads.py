"""OpenMP's worker threads, of which every Python thread that computes has a team of its own."""

import ctypes
import os

_SOFT = 1  # omp_pause_soft: what was set, such as the number of threads, stays


def release_team() -> None:
    """End the workers of the calling thread; its next parallel loop starts new ones, within some 0.1 ms.

    GNU OpenMP lets workers spin between two loops only while all teams of the process have no more threads than the
    machine has cores. With an idle team beside it, every loop of another thread begins with waking its workers: a token
    of a small model then takes 1.6 times as long. So a thread that is going to wait gives its team up.
    """
    if os.name == "posix" and (pause := getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)):
        pause(_SOFT)
