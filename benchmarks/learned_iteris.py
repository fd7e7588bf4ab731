"""IterIS's memory and the time of its solve, beside the naive way; a part of `benchmarks.learned`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.func import functional_call

import lorakern as lk
from benchmarks.skills.iteris import SAMPLES_A_BATCH, texts
from lorakern.errors import LorakernError
from lorakern.integrations import smollm2
from lorakern.integrations.transformers import attach
from lorakern.merge import iteris

ADAPTERS = Path(__file__).parent / "skills" / "adapters"
# one of them targets every linear layer
SKILLS = ("answer_json", "iso_date", "initials", "sort_words")
ALPHA = 1e-5
OPTIONS = {"alpha": ALPHA, "batch_size": SAMPLES_A_BATCH}


def problem(samples: int):
    """The model, its tokenizer, four adapters, and so many samples of each one's task."""
    model, tokenizer = smollm2.load()
    adapters = [lk.LoraAdapter.load(ADAPTERS / skill) for skill in SKILLS]
    return model, tokenizer, adapters, [texts(skill, samples, 0) for skill in SKILLS]


def memory(max_memory: int | None, samples: int) -> dict:
    """Peak resident memory of two sweeps in a process of their own, and that of the model after a forward alone."""
    script = "from benchmarks.learned_iteris import _memory; import sys; _memory(*map(int, sys.argv[1:]))"
    arguments = [str(samples), *([] if max_memory is None else [str(max_memory)])]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LorakernError(f"bench: the process that measures memory failed: {done.stderr.strip()[-300:]}")
    return {"case": "memory", "max_memory": max_memory, **json.loads(done.stdout.splitlines()[-1])}


def _memory(samples: int, max_memory: int | None = None) -> None:
    model, tokenizer, adapters, sources = problem(samples)
    batch = tokenizer(sources[0][:SAMPLES_A_BATCH], return_tensors="pt", padding=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    base = _status("VmRSS")
    # loading the model had a peak of its own
    Path("/proc/self/clear_refs").write_text("5")
    iteris.solve(model, adapters, sources, iterations=2, max_memory=max_memory, tokenizer=tokenizer, **OPTIONS)
    print(json.dumps({"base": base, "peak": _status("VmHWM"), "sums": largest_group(max_memory)}))


def largest_group(max_memory: int | None) -> int:
    """Bytes of C and G in float64 of the layers that are taken at once: all of them, or what may be kept."""
    config = smollm2.load()[0].config
    wide, narrow = config.intermediate_size, config.hidden_size
    # inputs of q, k, v; of o; of gate, up; and of down
    whole = config.num_hidden_layers * 2 * 8 * (3 * narrow**2 + wide**2)
    return whole if max_memory is None else min(whole, max_memory)


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def solve(samples: int) -> dict:
    """One sweep in which the merged model is another than the base: ours, the naive way, and its forwards alone."""
    model, tokenizer, adapters, sources = problem(samples)
    options = {"tokenizer": tokenizer, **OPTIONS}
    times, solutions = [], []
    for iterations in (1, 2):
        start = time.perf_counter()
        solutions.append(iteris.solve(model, adapters, sources, iterations=iterations, **options))
        times.append(time.perf_counter() - start)
    one, two = solutions
    sweep = times[1] - times[0]
    batches = [_batches(tokenizer, source) for source in sources]
    forwards = _timed(lambda: list(_features(model, adapters, batches, one.updates)))
    start = time.perf_counter()
    updates = naive(model, adapters, batches, one)
    spent = time.perf_counter() - start
    squares = [((updates[m] - two.updates[m]).square().sum(), updates[m].square().sum()) for m in updates]
    difference = (sum(float(d) for d, _ in squares) / sum(float(u) for _, u in squares)) ** 0.5
    record = {"case": "solve", "samples": samples, "sweep": sweep, "naive": spent, "forwards": forwards}
    return record | {"whole": times, "difference": difference}


def naive(
    model: torch.nn.Module, adapters: Sequence[lk.LoraAdapter], batches: Sequence[Iterable[dict]], merged
) -> dict[str, torch.Tensor]:
    """The formula as it stands: float64 sums of every adapter and layer, and a general solve of each layer."""
    layers = dict.fromkeys(module for adapter in adapters for module in adapter)
    shapes = {module: model.get_submodule(module).weight.shape for module in layers}
    right = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in shapes.items()}
    left = {module: torch.zeros(shape[1], shape[1], dtype=torch.float64) for module, shape in shapes.items()}
    for i, adapter in enumerate(adapters):
        C = {module: torch.zeros_like(G) for module, G in left.items()}
        G = {module: torch.zeros_like(G) for module, G in left.items()}
        for module, X, X_merged in _features(model, [adapter], [batches[i]], merged.updates):
            X, X_merged = X.double(), X_merged.double()
            C[module] += X.T @ X_merged
            G[module] += X_merged.T @ X_merged
        for module in layers:
            weight, d_in = merged.lambdas[module][i], len(C[module])
            identity = ALPHA * torch.eye(d_in, dtype=torch.float64)
            left[module] += weight * (G[module] + G[module].norm() * identity)
            if module in adapter:
                A, B, scale = adapter[module]
                W = scale * B.double() @ A.double()
                right[module] += weight * W @ (C[module] + C[module].norm() * identity)
    return {module: torch.linalg.solve(left[module].T, right[module].T).T.float() for module in layers}


def _batches(tokenizer, source: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    parts = [source[i : i + SAMPLES_A_BATCH] for i in range(0, len(source), SAMPLES_A_BATCH)]
    return [dict(tokenizer(p, return_tensors="pt", padding=True, padding_side="right")) for p in parts]


def _features(
    model: torch.nn.Module, adapters: Sequence[lk.LoraAdapter], batches: Sequence[Iterable[dict]], updates
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Module by module the inputs in the model with an adapter and in the merged one, batch by batch, a row a token."""
    weights = {f"{m}.weight": model.get_submodule(m).weight.detach() + update for m, update in updates.items()}
    for adapter, own in zip(adapters, batches, strict=True):
        attached = attach(model, {"own": adapter})
        try:
            for batch in own:
                mask = batch["attention_mask"].bool().reshape(-1)
                with torch.no_grad(), attached.use(["own"]), _caught(model, updates, mask) as task:
                    model.model(**batch, use_cache=False)
                with torch.no_grad(), _caught(model, updates, mask) as now:
                    functional_call(model, weights, (), {**batch, "use_cache": False, "logits_to_keep": 1})
                yield from ((module, task[module], now[module]) for module in task)
        finally:
            attached.detach()


@contextmanager
def _caught(model: torch.nn.Module, modules: Iterable[str], mask: torch.Tensor):
    inputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def keep(module, given) -> None:
            inputs[name] = given[0].reshape(-1, given[0].shape[-1])[mask]

        return keep

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield inputs
    finally:
        for handle in hooks:
            handle.remove()


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
