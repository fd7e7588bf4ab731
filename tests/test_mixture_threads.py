"""A thread that waits has no OpenMP workers: idle ones would slow the engine's."""

import os
import sys
import threading
import time

import pytest
import torch

from lorakern.mixture._threads import release_team


def count(wanted):
    """Threads of this process; those that end are given a second."""
    end = time.monotonic() + 1
    while (found := len(os.listdir("/proc/self/task"))) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_team_ends_and_starts_anew():
    found = []

    def work():
        torch.set_num_threads(2)
        x = torch.ones(1 << 20)
        release_team()
        before = len(os.listdir("/proc/self/task"))
        for _ in range(2):
            x.add_(1)
            found.append(count(before + 1) - before)
            release_team()
            found.append(count(before) - before)
        found.append((torch.get_num_threads(), float(x.min())))

    threads = torch.get_num_threads()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    torch.set_num_threads(threads)
    assert found == [1, 0, 1, 0, (2, 3.0)]
