"""Before any speed: are the answers right, the adapters in their slots, and the kernels those of the contender?"""

from __future__ import annotations

import math

import torch

from benchmarks.serving.workers import OURS, PLAIN, THEIRS, Worker
from benchmarks.serving.workload import ADAPTERS, SEED, sample
from lorakern.errors import LorakernError

SCORED = 64  # tokens whose log-probabilities are compared, drawn at random
# RMS difference of the two LoRA paths over the RMS effect of LoRA, in the request where it is largest. Rounding in
# bfloat16 gives 0.2; no adapter would give 1, another one's effect 1.4.
MAX_ERROR = 0.5
WRAPPERS = {PLAIN: None, THEIRS: "vllm.lora.", OURS: "lorakern."}


def started(name: str, described: dict) -> None:
    """
    Raises:
        LorakernError: the engine does not run the LoRA kernels that it is timed for.
    """
    wanted, found = WRAPPERS[name], described["wrapper"]
    if (found is None) != (wanted is None) or (wanted and not found.startswith(wanted)):
        raise LorakernError(f"bench: the engine of {name!r} runs the LoRA kernels of {found}")


def scored_tokens(vocabulary: int) -> list[int]:
    return torch.randint(100, vocabulary, (SCORED,), generator=torch.Generator().manual_seed(SEED)).tolist()


def rms(left: list, right: list) -> float:
    """Of the difference.

    >>> rms([[1.0, 2.0]], [[1.0, 4.0]])
    1.4142135623730951
    """
    return math.sqrt(
        torch.tensor(left, dtype=torch.float64).sub(torch.tensor(right, dtype=torch.float64)).square().mean()
    )


def agreement(left: list[list[int]], right: list[list[int]]) -> dict[str, float]:
    """Shares of greedy tokens that agree: the first of each request, and all up to the first that differs.

    >>> agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 0, 4], [0, 6, 7, 8]])
    {'first': 0.5, 'until_differing': 0.25}
    """
    same = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(left, right, strict=True)]
    lengths = [[*of, False].index(False) for of in same]
    return {
        "first": sum(of[0] for of in same) / len(same),
        "until_differing": sum(lengths) / sum(map(len, same)),
    }


def compare(answers: dict[str, dict]) -> dict:
    """The first answers of all engines beside each other.

    Returns:
        "effect": RMS of what LoRA changes in the log-probabilities; where vLLM's LoRA ran too, "difference": RMS
        between the two LoRA paths, "error": the one over the other, "worst": the same in the request where it is
        largest, and the agreement of greedy tokens.
    """
    beside = answers.get(THEIRS, answers[OURS])
    found = {"effect": rms(beside["scores"], answers[PLAIN]["scores"])}
    if THEIRS in answers:
        difference = rms(answers[OURS]["scores"], beside["scores"])
        scores = zip(answers[OURS]["scores"], beside["scores"], answers[PLAIN]["scores"], strict=True)
        worst = [rms(ours, theirs) / max(rms(theirs, plain), 1e-9) for ours, theirs, plain in scores]
        found |= {
            "difference": difference,
            "error": difference / found["effect"],
            "worst": torch.tensor(worst).max().item(),
        }
        found |= agreement(answers[OURS]["tokens"], beside["tokens"])
    return found


def warm_up(workers: dict[str, Worker], vocabulary: int) -> dict:
    """Let every engine answer a request for each adapter, which also loads them, and compare the answers.

    Raises:
        LorakernError: an adapter is in no slot, LoRA changes nothing, or the two LoRA paths differ too much.
    """
    asked, ids = sample(vocabulary), scored_tokens(vocabulary)
    answers = {}
    for name, worker in workers.items():
        answers[name] = worker.serve(asked, ids)
        slots = answers[name]["slots"]
        if worker.contender.lora and not set(range(1, ADAPTERS + 1)) <= set(slots):
            raise LorakernError(f"bench: {name} has the adapters {slots} in its slots, and not all of 1 to {ADAPTERS}")
    found = compare(answers)
    if not found["effect"] > 0:
        raise LorakernError("bench: the answers with and without adapters are the same")
    if not found.get("worst", 0.0) <= MAX_ERROR:
        raise LorakernError(
            f"bench: {OURS} and {THEIRS} give a request log-probabilities that differ by {found['worst']:.2f} "
            f"of what LoRA changes (at most {MAX_ERROR}): nothing is timed"
        )
    return found
