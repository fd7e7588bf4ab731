"""IterIS and RegMean on the skill adapters: objective and exact match of four skills in one model."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch

import lorakern as lk
from benchmarks.skills.evaluate import answers, exact_match
from benchmarks.skills.merges import BASE, OWN, largest_ranks
from benchmarks.skills.merges import WAYS as WITHOUT_DATA
from benchmarks.skills.results import Stored
from benchmarks.skills.tasks import END, different, format_prompt, held_out_items, stream
from lorakern.merge import iteris

ALPHA = 1e-5
SWEEPS = (1, 2, 4)
LAST = f"IterIS, {SWEEPS[-1]} sweeps"
LORA = f"{LAST}, as LoRA"
STATIC = tuple(
    way for way in WITHOUT_DATA if way.name in ("weight average", "mean of the updates", "task arithmetic", "TIES, r")
)
REGMEAN = "RegMean"
WAYS = (*(way.name for way in STATIC), REGMEAN, *(f"IterIS, {n} sweep{'s'[: n > 1]}" for n in SWEEPS), LORA)
BATCH = 96
SAMPLES_A_BATCH = 25

Updates = Mapping[str, Any]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured: sets of skills, samples a task, questions a skill, seeds, and the rank of the LoRA.

    A seed draws the samples and the questions.
    """

    sets: tuple[tuple[str, ...], ...]
    samples: int
    count: int
    seeds: int

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(vars(self) | {"ways": WAYS, "alpha": ALPHA}))


def settings(skills: Sequence[str], sets: int, samples: int, count: int, seeds: int) -> Settings:
    """Sets of four skills, each a third of the way through the list from the one before it, so that skills take turns.

    >>> settings(list("abcdefgh"), 2, 50, 20, 3).sets
    (('a', 'd', 'g', 'b'), ('b', 'e', 'h', 'c'))
    """
    chosen = tuple(tuple(skills[(first + 3 * i) % len(skills)] for i in range(4)) for first in range(sets))
    return Settings(chosen, samples, count, seeds)


class Results(Stored):
    """A record for each set and seed that is measured."""

    kept: ClassVar = {"runs": list}

    def missing(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """The sets and seeds that are not measured yet."""
        done = {(tuple(run["skills"]), run["seed"]) for run in self.runs}
        for seed in range(self.settings.seeds):
            yield from ((skills, seed) for skills in self.settings.sets if (skills, seed) not in done)


def texts(skill: str, count: int, seed: int) -> list[str]:
    """So many different questions of the training split with their answers, as the skill's adapter was trained on."""
    items = different(stream(skill, held_out=False, seed=seed), count)
    return [format_prompt(prompt) + answer + END for prompt, answer in items]


def run(results: Results, adapters: Mapping[str, lk.LoraAdapter], model, scorer, tokenizer, report: Report) -> None:
    """Measure what `results` lacks.

    Args:
        model: float32, in which the merges are computed.
        scorer: the same in bfloat16, which answers.
        report: called with what is under way.
    """
    folded = Folded(scorer)
    for skills, seed in list(results.missing()):
        chosen = [adapters[skill] for skill in skills]
        samples = [texts(skill, results.settings.samples, seed) for skill in skills]
        record: dict[str, Any] = {"skills": skills, "seed": seed, "objectives": {}, "exact": {}}
        title = f"{' + '.join(skills)}, seed {seed}"
        for way, updates in merged(
            chosen, samples, model, tokenizer, record, lambda what, t=title: report(f"{t}: {what}")
        ):
            with folded.by(updates):
                record["exact"][way] = asked(scorer, tokenizer, skills, results.settings.count, seed)
        for way, of in ((BASE, lambda i: {}), (OWN, lambda i, chosen=chosen: chosen[i])):
            record["exact"][way] = {}
            for i, skill in enumerate(skills):
                with folded.by(of(i)):
                    record["exact"][way] |= asked(scorer, tokenizer, [skill], results.settings.count, seed)
        results.runs.append(record)
        results.save()


def merged(
    adapters: Sequence[lk.LoraAdapter], samples: Sequence[Sequence[str]], model, tokenizer, record: dict, report: Report
) -> Iterator[tuple[str, Updates]]:
    """Every way and its updates; objectives and the energy that the LoRA keeps go into the record."""
    common = {"tokenizer": tokenizer, "batch_size": SAMPLES_A_BATCH}
    common["progress"] = lambda done, total, what: report(f"{what} ({done + 1} of {total})")
    for way in STATIC:
        report(way.name)
        yield way.name, way.merged(adapters, 0)
    updates = iteris.regmean(model, adapters, samples, alpha=ALPHA, **common).updates
    record["objectives"][REGMEAN] = sum(iteris.objective(model, adapters, samples, updates, **common).values())
    yield REGMEAN, updates
    with tempfile.TemporaryDirectory() as state:
        for sweeps in SWEEPS:
            solution = iteris.solve(
                model, adapters, samples, iterations=sweeps, alpha=ALPHA, state=Path(state) / "state", **common
            )
            yield f"IterIS, {sweeps} sweep{'s'[: sweeps > 1]}", solution.updates
    record["objectives"]["IterIS"] = solution.objectives
    report("truncating")
    lora, energy = solution.adapter(max(largest_ranks(adapters).values()))
    record["energy"] = statistics.mean(energy.values())
    yield LORA, lora


class Folded:
    """A model whose weights hold updates for a while; all of them rounded once, in the dtype of the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = dict(model.named_parameters())
        self._base = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._changed: list[str] = []

    def by(self, updates: Updates) -> Folded:
        """Updates by module, dense (d_out, d_in) or (A, B, scale), until the end of the `with` block."""
        for module, update in updates.items():
            if not isinstance(update, torch.Tensor):
                update = update.scale * update.B.float() @ update.A.float()
            name = f"{module}.weight"
            self._changed.append(name)
            self._weights[name].data.copy_(self._base[name].float() + update)
        return self

    def __enter__(self) -> Folded:
        return self

    def __exit__(self, *error: object) -> None:
        while self._changed:
            name = self._changed.pop()
            self._weights[name].data.copy_(self._base[name])


def asked(model, tokenizer, skills: Sequence[str], count: int, seed: int) -> dict[str, float]:
    """Exact match of each skill on held-out questions."""
    items = {skill: held_out_items(skill, count, seed) for skill in skills}
    replies = iter(answers(model, tokenizer, [item for own in items.values() for item in own], batch=BATCH))
    return {skill: exact_match(list(islice(replies, count)), own) for skill, own in items.items()}
