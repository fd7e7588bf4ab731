"""OpenMP's worker threads, of which every Python thread that computes has a team of its own, and their memory."""

import ctypes
import os

_SOFT = 1  # omp_pause_soft: what was set, such as the number of threads, stays
_M_ARENA_MAX = -8


def release_team() -> None:
    """End the workers of the calling thread; its next parallel loop starts new ones, within some 0.1 ms.

    GNU OpenMP lets workers spin between two loops only while all teams of the process have no more threads than the
    machine has cores. With an idle team beside it, every loop of another thread begins with waking its workers: a token
    of a small model then takes 1.6 times as long. So a thread that is going to wait gives its team up.
    """
    if os.name == "posix" and (pause := getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)):
        pause(_SOFT)


def limit_arenas(count: int = 2) -> None:
    """Let glibc's malloc have so many arenas, in place of eight a core; other allocators are left alone.

    Each thread of a new team takes whichever arena is free, and leaves in it what it does not give back: with many
    arenas a server grew by 0.1 MB a request over its first two thousand.
    """
    if os.name == "posix" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_ARENA_MAX, count)
