"""Exact match on composite tasks: every way to compose two skill adapters, measured so that a stopped run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lorakern as lk
from benchmarks.records import write_beside
from benchmarks.skills.composites import composite
from benchmarks.skills.composites_learn import LEARNED, Budget, Facts, Lesson, optimizer_name, plain_attention
from benchmarks.skills.merges import Way, ask
from benchmarks.skills.results import Stored
from benchmarks.skills.tasks import different, held_out_items
from lorakern.errors import LorakernError

BASE, FIRST, SECOND = "base model", "first skill", "second skill"
# 0.75 with weights 1 is what the LoRA Soups paper gives PEFT; the rows after those are the settings of merges.py.
STATIC = (
    Way("uniform mixture", "cat", "1/N"),
    Way("linear, weights 1/N", "peft_linear", "1/N"),
    Way("linear, weights 1", "peft_linear"),
    Way("task arithmetic 0.4", "cat", 0.4),
    Way("task arithmetic 1", "cat"),
    Way("TIES, PEFT's", "peft_ties", options={"density": 0.75}),
    Way("DARE, PEFT's", "peft_dare_linear", options={"density": 0.75}, seeded=True),
    Way("TIES", "ties", width=2, options={"density": 0.2}),
    Way("DARE", "dare_linear", 0.4, 2, {"density": 0.5}, seeded=True),
)
WAYS = (BASE, FIRST, SECOND, *(way.name for way in STATIC), *LEARNED)
KINDS = ("composite", FIRST, SECOND)


@dataclass(frozen=True)
class Settings:
    """What is measured: composites, how many questions of each, and of each skill alone, of how many seeds.

    A seed draws the questions, the examples, and what a method draws.
    """

    composites: tuple[str, ...]
    count: int
    own: int
    seeds: int
    budget: Budget = field(default_factory=Budget)

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self) | {"ways": WAYS, "optimizer": optimizer_name()}))

    def parts(self) -> list[tuple[str, int]]:
        """(composite, seed), every composite once before any has its next seed."""
        return [(name, seed) for seed in range(self.seeds) for name in self.composites]

    @property
    def answers(self) -> int:
        """How many answers a part takes."""
        return len(WAYS) * (self.count + 2 * self.own)


def quick(composites: Sequence[str]) -> Settings:
    """A run of minutes that shows that everything works, and no more than that."""
    small = Budget(examples=16, shots=8, candidates=4, cat_epochs=1, lora_epochs=1, mix_steps=2)
    return Settings(tuple(composites), 4, 2, 1, small)


class Results(Stored):
    """A record for each part that is measured."""

    kept: ClassVar = {"records": list}

    def missing(self) -> list[tuple[str, int]]:
        """The parts that are not measured yet."""
        done = {(record["composite"], record["seed"]) for record in self.records}
        return [part for part in self.settings.parts() if part not in done]


Report = Callable[[int, str], None]


def run(
    results: Results, model, tokenizer, adapters: Mapping[str, lk.LoraAdapter], runs: Path, report: Report
) -> Iterator[None]:
    """Measure what `results` lacks, a part at each step of the iterator.

    Args:
        adapters: of every skill of the composites.
        runs: a folder for adapters that are learned; those that are there already are not learned again.
        report: called as report(answers since the last time, what is being done).

    Raises:
        LorakernError: `runs` is of another budget.
    """
    wanted = results.settings
    _claim(runs, {key: results.said[key] for key in ("budget", "optimizer")})
    report(wanted.answers * len(results.records), "")
    for name, seed in results.missing():
        title = f"{name}, seed {seed}"
        task = composite(name)
        pair = tuple(adapters[skill] for skill in task.skills)
        ways: dict[str, Sequence[lk.LoraAdapter | None]] = {BASE: [None], FIRST: [pair[0]], SECOND: [pair[1]]}
        for way in STATIC:
            report(0, f"{title}: {way.name}")
            ways[way.name] = [way.merged(pair, seed)]
        learned: dict[str, Facts] = {}
        for way in LEARNED:
            folder = runs / _slug(name) / f"{_slug(way)}-{seed}"
            told = f"{title}: {way}"
            lesson = Lesson(
                task, pair, seed, wanted.budget, model, tokenizer, folder, lambda note, t=told: report(0, f"{t} {note}")
            )
            adapter, learned[way] = learn(way, lesson)
            ways[way] = [adapter]
        questions = {
            KINDS[0]: [different(task.stream(held_out=True, seed=seed), wanted.count)],
            FIRST: [held_out_items(task.first, wanted.own, seed)],
            SECOND: [held_out_items(task.second, wanted.own, seed)],
        }
        scores = ask(model, tokenizer, ways, questions, lambda n, title=title: report(n, title))
        flat = {way: {kind: of_seed[0] for kind, of_seed in kinds.items()} for way, kinds in scores.items()}
        results.records.append({"composite": name, "seed": seed, "scores": flat, "learned": learned})
        results.save()
        yield


def learn(way: str, lesson: Lesson) -> tuple[lk.LoraAdapter, Facts]:
    """The adapter of a learned way and what is to be told of it: learned now, or read from the lesson's folder."""
    told, adapter = lesson.folder / "facts.json", lesson.folder / "adapter"
    if told.exists():
        return lk.LoraAdapter.load(adapter), json.loads(told.read_text())
    lesson.folder.mkdir(parents=True, exist_ok=True)
    with plain_attention(lesson.model):
        made, facts = LEARNED[way](lesson)
    made.save(adapter)
    write_beside(told, json.dumps(facts) + "\n")
    return made, facts


def _claim(runs: Path, budget: dict[str, Any]) -> None:
    """Keep adapters of one budget from a run with another."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / "budget.json"
    if path.exists() and json.loads(path.read_text()) != budget:
        raise LorakernError(f"runs {runs} holds adapters that were learned with another budget; give another folder")
    write_beside(path, json.dumps(budget) + "\n")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
