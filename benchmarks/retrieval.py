"""Does a request find its adapter, and how fast? `python -m benchmarks.retrieval [accuracy] [speed]`.

accuracy: the pool is all shipped skills, the reworded ones too, 20 sample prompts each. MiniLM as it is beside MiniLM
trained by InfoNCE on 40 % of the skills; queries are held-out prompts of the skills that were trained on, and of those
that were not.
speed: one query and sixteen, exact search beside a plain float32 product, over random unit vectors.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from itertools import islice

import torch

from benchmarks import machine
from benchmarks.floors import ReadProbe
from benchmarks.skills.tasks import SKILLS, held_out_items, stream
from benchmarks.timing import Effort, in_turns
from lorakern.mixture import LoraRetriever, MiniLM, retrieval_accuracy, train_encoder
from lorakern.mixture._scores import best, exact_scores
from lorakern.mixture.exact_index import ExactIndex
from lorakern.mixture.store import Store

SAMPLES, TRAIN_TEXTS, QUERIES, TRAIN_SHARE, DIM, K = 20, 100, 50, 0.4, 384, 3
KS = (1, K)
Texts = dict[str, list[str]]


def whole(prompt: str) -> str:
    """A prompt as it is: it begins by saying what to do."""
    return prompt


def bare(prompt: str) -> str:
    """What the skill is done to, without the words that name it; several skills share such inputs."""
    return prompt.partition(": ")[2] or prompt


VIEWS: dict[str, Callable[[str], str]] = {"prompts": whole, "inputs alone": bare}


def texts_of(view: Callable[[str], str], count: int, seed: int, held_out: bool) -> Texts:
    """`count` texts of every skill, from one of its splits."""
    if held_out:
        return {name: [view(prompt) for prompt, _ in held_out_items(name, count, seed)] for name in SKILLS}
    streams = {name: stream(name, held_out=False, seed=seed) for name in SKILLS}
    return {name: [view(prompt) for prompt, _ in islice(items, count)] for name, items in streams.items()}


def accuracies(encoder: MiniLM, samples: Texts, queries: Texts, trained: list[str]) -> dict[tuple[str, int], float]:
    """Top-k accuracy of a pool of all skills, for queries of the trained skills and of the others."""
    retriever = LoraRetriever(encoder)
    for name, texts in samples.items():
        retriever.add(name, texts)
    groups = {"trained": trained, "unseen": [name for name in queries if name not in trained]}
    return {
        (group, k): share
        for group, names in groups.items()
        for k, share in retrieval_accuracy(retriever, {name: queries[name] for name in names}, ks=KS).items()
    }


def accuracy(seeds: int, steps: int) -> None:
    """Print the table: mean, lowest and highest over the seeds, each with another choice of training skills."""
    print(
        f"\n{len(SKILLS)} adapters, {SAMPLES} samples each, {QUERIES} held-out queries a skill; {seeds} choices of the"
    )
    print(f"{TRAIN_SHARE:.0%} of the skills to train on, {steps} steps of 16 pairs; mean (lowest to highest)\n")
    print("| texts | encoder | queries of | top-1 | top-3 |\n|---|---|---|---|---|")
    for view_name, view in VIEWS.items():
        runs: dict[tuple[str, str, int], list[float]] = {}
        for seed in range(seeds):
            trained = random.Random(seed).sample(sorted(SKILLS), round(TRAIN_SHARE * len(SKILLS)))
            samples, queries = texts_of(view, SAMPLES, seed + 1, False), texts_of(view, QUERIES, seed, True)
            encoder = MiniLM()
            for state in ("as it is", "trained"):
                if state == "trained":
                    texts = texts_of(view, TRAIN_TEXTS, seed + 1000, False)
                    train_encoder(encoder, {name: texts[name] for name in trained}, steps=steps, seed=seed)
                for (group, k), share in accuracies(encoder, samples, queries, trained).items():
                    runs.setdefault((state, group, k), []).append(share)
        for state in ("as it is", "trained"):
            for group in ("trained", "unseen"):
                cells = [_spread(runs[state, group, k]) for k in KS]
                print(f"| {view_name} | {state} | {group} skills | {' | '.join(cells)} |", flush=True)


def _spread(shares: list[float]) -> str:
    return f"{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"


def speed(counts: list[int]) -> None:
    """Print times a query; a result that is not the brute force's is not timed."""
    print(f"\ntop {K} of unit vectors of {DIM} numbers, {torch.get_num_threads()} threads; ms a query, the median\n")
    print("| adapters | queries at once | exact search | float32 product, top-k | reading the float16 copy |")
    print("|---|---|---|---|---|")
    generator, probe = torch.Generator().manual_seed(0), ReadProbe("cpu")
    for count in counts:
        rows = torch.nn.functional.normalize(torch.randn(count, DIM, generator=generator), dim=1)
        store = Store(DIM, ExactIndex)
        store.add([str(i) for i in range(count)], rows, False)
        for queries in (1, 16):
            asked = torch.nn.functional.normalize(torch.randn(queries, DIM, generator=generator), dim=1)
            _check(store, rows, asked)
            functions = {
                "ours": lambda s=store, q=asked: s.snapshot.search(q, [K] * len(q)),
                "product": lambda v=rows, q=asked: (q @ v.T).topk(K, dim=1),
                "read": probe,
            }
            timed = {name: 1e3 * entry["seconds"] for name, entry in in_turns(functions, Effort(1.0, 5, 50)).items()}
            ours, product = timed["ours"] / queries, timed["product"] / queries
            floor = timed["read"] * 2 * count * DIM / probe.bytes / queries
            print(f"| {count} | {queries} | {ours:.3f} | {product:.3f} | {floor:.3f} |", flush=True)


def _check(store: Store, rows: torch.Tensor, queries: torch.Tensor) -> None:
    found = store.snapshot.search(queries, [K] * len(queries))
    for query, row in zip(queries, found, strict=True):
        expected = [(str(i), score) for i, score in best(exact_scores(query, rows), torch.arange(len(rows)), K)]
        if row != expected:
            raise AssertionError(f"exact search found {row}, brute force {expected}; a wrong result is not timed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["accuracy", "speed"], help="both by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1000, 10_000, 100_000])
    arguments = parser.parse_args()
    parts = arguments.parts or ["accuracy", "speed"]
    print("\n".join(machine.lines(machine.describe("cpu"))))
    if "accuracy" in parts:
        accuracy(arguments.seeds, arguments.steps)
    if "speed" in parts:
        speed(arguments.adapters)


if __name__ == "__main__":
    main()
