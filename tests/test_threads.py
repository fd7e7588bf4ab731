"""Threads: one pool in the process, as many of its threads as torch allows, any number of callers, forks."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch
from problems import problem

import lorakern as lk
from lorakern.backends import cpu

# Functions of the programs below, which run in processes of their own.
RUNTIMES = """
import json

def runtimes():
    with open("/proc/self/maps") as maps:
        names = {line.split()[-1] for line in maps if ".so" in line}
    return sorted(name for name in names if any(part in name for part in ("libgomp", "libomp", "libiomp")))

def call():
    a, b = torch.randn(2, 16, 1024), torch.randn(2, 1024, 16)
    lk.bgmv(torch.zeros(256, 1024), torch.randn(256, 1024), a, b, torch.arange(256) % 2)
"""
BUSY_THREADS = """
import json, os
import torch
import lorakern as lk

def ticks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        found[int(task)] = int(fields[11]) + int(fields[12])
    return found

a, b, indices = torch.randn(2, 64, 1024), torch.randn(2, 1024, 64), torch.arange(1024) % 2
x, y = torch.randn(1024, 1024), torch.zeros(1024, 1024)

def shares(threads):
    '''Percent of the CPU time of a second of calls, by thread, the caller first.'''
    torch.set_num_threads(threads)
    lk.bgmv(y, x, a, b, indices)
    before, spent = ticks(), {}
    while sum(spent.values()) < os.sysconf("SC_CLK_TCK"):
        for _ in range(10):
            lk.bgmv(y, x, a, b, indices)
        spent = {task: now - before.get(task, 0) for task, now in ticks().items()}
    caller = spent.pop(os.getpid())
    total = caller + sum(spent.values())
    return [100 * caller / total, *sorted((100 * s / total for s in spent.values()), reverse=True)]

print(json.dumps([shares(1), shares(2), shares(1)]))
"""


def output_of(program):
    """The JSON that a program prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def slow_isa():
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(cpu._cpu.usable_isas()[0])
    yield
    cpu._cpu.force_isa(before)


def at_once(work, count):
    """work(0) .. work(count - 1), each on a Python thread of its own: their results."""
    results = [None] * count
    start = threading.Barrier(count)

    def run(i):
        start.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("first", ["torch", "lorakern"])
def test_no_second_openmp_runtime(first):
    """Only what torch itself loads, whichever is imported first, also after a call."""
    imports = ["import torch", "import lorakern as lk"]
    imports = imports if first == "torch" else imports[::-1]
    steps = [f"{line}; found.append(runtimes())" for line in (*imports, "call()")]
    found = output_of("\n".join([RUNTIMES, "found = []", *steps, "print(json.dumps(found))"]))
    torch_alone = output_of(RUNTIMES + "import torch; print(json.dumps(runtimes()))")
    assert len(torch_alone) == 1
    assert found == [torch_alone] * 3
    assert lk.info()["threads"]["shared_pool"]


def test_torch_set_num_threads_is_obeyed():
    """By the CPU time of every thread of a process: with one, only the caller works; with two, one other, no third."""
    for_one, for_two, for_one_again = output_of(BUSY_THREADS)
    assert for_one[0] > 98 and for_one_again[0] > 98
    assert for_two[0] > 5 and for_two[1] > 5 and sum(for_two[2:]) < 2


@pytest.mark.usefixtures("threads_restored")
def test_result_does_not_depend_on_threads():
    p = problem(torch.bfloat16, 200, 4, 6, 576, (576, 192), 33)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(p.bgmv())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_concurrent_callers():
    """Several Python threads at once, each with its own problem, all results as alone."""
    problems = [problem(torch.bfloat16, 40 * i + 1, i % 3 + 1, i + 1, 500, (130, 64), 24, seed=i) for i in range(8)]
    expected = [p.bgmv() for p in problems]
    assert all(at_once(lambda i: all(torch.equal(problems[i].bgmv(), expected[i]) for _ in range(10)), 8))


def test_concurrent_callers_of_one_problem():
    """Weights, routing and plan shared by all callers, forward and backward."""
    p = problem(torch.float32, 200, 2, 5, 300, (130,), 24).without_nan()
    plan = lk.plan(p.indices, 5)

    def work(_):
        leaves = [t.detach().requires_grad_() for t in (p.x, p.A[0], p.B[0], p.gates)]
        x, a, b, gates = leaves
        delta = lk.lora_delta(x, a, b, p.indices, scale=p.scale, ranks=p.ranks, gates=gates, plan=plan)
        return [delta, *torch.autograd.grad(delta.square().sum(), leaves)]

    expected = work(0)
    for results in at_once(work, 6):
        assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))


def test_an_error_stays_in_the_thread_of_its_call():
    p = problem(torch.float32, 100, 1, 5, 300, (130,), 24)
    expected = p.bgmv()

    def work(i):
        outcomes = []
        for _ in range(20):
            indices = p.indices.clone()
            if i % 2:
                indices[50] = 100 + i
            try:
                outcomes.append(
                    torch.equal(lk.bgmv(p.y.clone(), p.x, p.A, p.B, indices, y_offset=3, **p.options), expected)
                )
            except lk.LorakernError as error:
                outcomes.append(str(error))
        return outcomes

    for i, outcomes in enumerate(at_once(work, 6)):
        if i % 2:
            assert all(f"got {100 + i} for token 50" in str(outcome) for outcome in outcomes)
        else:
            assert outcomes == [True] * 20


@pytest.mark.parametrize("way", ["short", "general"])
@pytest.mark.usefixtures("threads_restored", "slow_isa")
def test_the_kernel_releases_the_gil(way):
    """During one long call another Python thread goes on. If the call held the GIL, it would take a step or two."""
    torch.set_num_threads(1)
    stop, steps, most, tokens = threading.Event(), [], 0, 256

    def step():
        while not stop.is_set():
            time.sleep(0.001)
            steps.append(None)

    other = threading.Thread(target=step)
    other.start()
    try:
        a, b, x = torch.randn(1, 64, 2048).half(), torch.randn(1, 2048, 64).half(), torch.randn(1, 2048).half()
        spent = 0
        for _ in range(20):  # again where the machine gave the other thread no time
            y, indices = torch.zeros(tokens, 2048, dtype=torch.half), torch.zeros(tokens, dtype=torch.long)
            if way == "general":
                y = y.t().contiguous().t()
            arguments = y, x.expand(tokens, -1), a, b, indices
            before, began = len(steps), time.thread_time()
            lk.bgmv(*arguments)
            spent, taken = time.thread_time() - began, len(steps) - before
            most = max(most, taken if spent > 0.2 else 0)
            if most >= 20:
                break
            tokens *= 1 if spent > 0.2 else 2
    finally:
        stop.set()
        other.join()
    assert most >= 20, f"{most} steps beside a call of {spent:.2f} s"


class CallsInWorkers(torch.utils.data.Dataset):
    """Items computed by lorakern, in the process that asks for them."""

    def __init__(self, p):
        self.p = p

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.p.bgmv()


def test_dataloader_workers_forked_after_use():
    """GNU OpenMP's threads do not survive a fork: like torch's ops, ours then need torch.set_num_threads(1), which
    the workers of a DataLoader call."""
    p = problem(torch.float32, 256, 1, 4, 512, (512,), 16)
    expected = p.bgmv()
    loader = torch.utils.data.DataLoader(
        CallsInWorkers(p), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=300
    )
    results = list(loader)
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)
