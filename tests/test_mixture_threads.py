"""A thread that waits has no OpenMP workers: idle ones would slow the engine's."""

import os
import platform
import subprocess
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


ARENAS = """
import ctypes, sys, threading
from lorakern.serve.run import limit_arenas
if sys.argv[1] == "limited":
    limit_arenas(2)
libc, meet = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
def work():
    meet.wait()
    libc.malloc(1000)
    meet.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_arenas_are_limited(tmp_path):
    """What malloc_info of glibc counts after eight threads have each allocated something at a time."""
    counts = {}
    for name in ("limited", "free"):
        report = tmp_path / name
        done = subprocess.run([sys.executable, "-c", ARENAS, name, str(report)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts[name] = report.read_text().count("<heap ")
    assert counts["limited"] <= 2 < counts["free"]
