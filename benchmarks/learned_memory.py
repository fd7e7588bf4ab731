"""How much memory does IterIS take? In a process of its own; a part of `benchmarks.learned`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import lorakern as lk
from benchmarks.learned_sums import ADAPTERS, ALPHA, SKILLS
from benchmarks.skills.iteris import SAMPLES_A_BATCH, texts
from lorakern.errors import LorakernError
from lorakern.integrations import smollm2
from lorakern.merge import iteris


def memory(max_memory: int | None, samples: int) -> dict:
    """Peak resident memory of two sweeps in a process of their own, and that of the model after a forward alone."""
    script = "from benchmarks.learned_memory import _solve; import sys; _solve(*map(int, sys.argv[1:]))"
    arguments = [str(samples), *([] if max_memory is None else [str(max_memory)])]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LorakernError(f"bench: the process that measures memory failed: {done.stderr.strip()[-300:]}")
    return {"case": "memory", "max_memory": max_memory, **json.loads(done.stdout.splitlines()[-1])}


def _solve(samples: int, max_memory: int | None = None) -> None:
    model, tokenizer = smollm2.load()
    adapters = [lk.LoraAdapter.load(ADAPTERS / skill) for skill in SKILLS]
    sources = [texts(skill, samples, 0) for skill in SKILLS]
    batch = tokenizer(sources[0][:SAMPLES_A_BATCH], return_tensors="pt", padding=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    base = _status("VmRSS")
    # loading the model had a peak of its own
    Path("/proc/self/clear_refs").write_text("5")
    options = {"alpha": ALPHA, "batch_size": SAMPLES_A_BATCH, "max_memory": max_memory, "tokenizer": tokenizer}
    iteris.solve(model, adapters, sources, iterations=2, **options)
    print(json.dumps({"base": base, "peak": _status("VmHWM"), "sums": largest_group(model.config, max_memory)}))


def largest_group(config, max_memory: int | None) -> int:
    """Bytes of C and G in float64 of the layers that are taken at once: all of them, or what may be kept."""
    wide, narrow = config.intermediate_size, config.hidden_size
    # inputs of q, k, v; of o; of gate, up; and of down
    whole = config.num_hidden_layers * 2 * 8 * (3 * narrow**2 + wide**2)
    return whole if max_memory is None else min(whole, max_memory)


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
