"""Exact match of merged skill adapters: every merge method, over pairs of skills and over all of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import lorakern as lk
from benchmarks.skills.evaluate import exact_match
from benchmarks.skills.results import Stored
from benchmarks.skills.tasks import Item, format_prompt, held_out_items
from lorakern.integrations.transformers import attach

Adapters = Mapping[str, lk.LoraAdapter]
BASE, OWN = "base model", "own adapter"
# A right answer in other tokens than the tokenizer makes of it may take a few more.
SPARE_TOKENS = 4
BATCH = 96


@dataclass(frozen=True)
class Way:
    """A way to merge N adapters, a row of the table.

    `weight` is that of each adapter, "1/N" their mean; `width` times the largest rank among the adapters is the rank
    of every module, None what the method says.
    """

    label: str
    method: str
    weight: float | str = 1.0
    width: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = False

    @property
    def name(self) -> str:
        return self.label if self.width is None else f"{self.label}, {'r' if self.width == 1 else f'{self.width}r'}"

    def merged(self, adapters: Sequence[lk.LoraAdapter], seed: int) -> lk.LoraAdapter:
        weight = 1 / len(adapters) if self.weight == "1/N" else self.weight
        rank = None
        if self.width is not None:
            rank = {module: self.width * rank for module, rank in largest_ranks(adapters).items()}
        return lk.merge(adapters, self.method, weights=[weight] * len(adapters), rank=rank, seed=seed, **self.options)


def largest_ranks(adapters: Sequence[lk.LoraAdapter]) -> dict[str, int]:
    """Module by module the largest rank among the adapters."""
    modules = dict.fromkeys(module for adapter in adapters for module in adapter)
    return {module: max(adapter[module].rank for adapter in adapters if module in adapter) for module in modules}


NO_PARAMETER, NO_OUTPUT = {"parameter_reweight": False}, {"output_reweight": False}
LEGO = {
    "LEGO": {},
    "LEGO, no parameter reweighting": NO_PARAMETER,
    "LEGO, no output reweighting": NO_OUTPUT,
    "LEGO, no reweighting": NO_PARAMETER | NO_OUTPUT,
    "LEGO, signs and balance": {"align_signs": True, "balance": True},
}
# 0.4 for task arithmetic, and 1 with a fifth of the entries for TIES, are what TIES-Merging takes without validation.
WAYS = (
    Way("weight average", "lorahub_linear", "1/N"),
    Way("mean of the updates", "cat", "1/N"),
    Way("task arithmetic", "cat", 0.4),
    Way("cat", "cat"),
    *(Way("svd", "svd", width=width) for width in (1, 2)),
    *(Way("TIES", "ties", width=width, options={"density": 0.2}) for width in (1, 2)),
    *(Way("DARE", "dare_linear", 0.4, width, {"density": 0.5}, seeded=True) for width in (1, 2)),
    *(Way(label, "lego", 1.0, width, options, seeded=True) for label, options in LEGO.items() for width in (1, 2)),
)


@dataclass(frozen=True)
class Settings:
    """What is measured: the skills, the sets of them that are merged, and how many questions of how many seeds.

    A seed draws the questions, and what a method draws.
    """

    skills: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    count: int
    seeds: int

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(vars(self) | {"ways": [way.name for way in WAYS]}))


def settings(skills: Sequence[str], count: int, seeds: int, pairs: int | None = None) -> Settings:
    """All pairs of the skills, or the first `pairs` in an order in which skills take turns; and all skills."""
    order = sorted(itertools.combinations(range(len(skills)), 2), key=lambda pair: (pair[1] - pair[0], pair))
    sets = [tuple(skills[i] for i in pair) for pair in order[:pairs]]
    whole = [tuple(skills)] if len(skills) > 2 else []
    return Settings(tuple(skills), tuple(sets + whole), count, seeds)


class Results(Stored):
    """Scores of each skill alone, and a record for each set that is measured."""

    kept: ClassVar = {"alone": dict, "sets": list}

    def missing(self) -> Iterator[tuple[str, ...]]:
        """The sets that are not measured yet."""
        done = {tuple(record["skills"]) for record in self.sets}
        yield from (skills for skills in self.settings.sets if skills not in done)


Report = Callable[[int, str], None]


def run(results: Results, model, tokenizer, adapters: Adapters, report: Report) -> None:
    """Measure what `results` lacks; report(answers since the last time, what they were of)."""
    wanted = results.settings
    for skill in wanted.skills:
        if skill in results.alone:
            report(2 * wanted.count * wanted.seeds, skill)
            continue
        ways = {BASE: [None] * wanted.seeds, OWN: [adapters[skill]] * wanted.seeds}
        scores = measure(model, tokenizer, ways, [skill], wanted, lambda n, skill=skill: report(n, f"{skill} alone"))
        results.alone[skill] = {way: scores[way][skill] for way in ways}
        results.save()
    missing = set(results.missing())
    for skills in wanted.sets:
        title = " + ".join(skills) if len(skills) == 2 else f"all {len(skills)}"
        if skills not in missing:
            report(len(WAYS) * len(skills) * wanted.count * wanted.seeds, title)
            continue
        report(0, f"{title}: merging")
        ways = {way.name: merges(way, [adapters[skill] for skill in skills], wanted.seeds) for way in WAYS}
        scores = measure(model, tokenizer, ways, skills, wanted, lambda n, title=title: report(n, title))
        results.sets.append({"skills": skills, "scores": scores})
        results.save()


def merges(way: Way, adapters: Sequence[lk.LoraAdapter], seeds: int) -> list[lk.LoraAdapter]:
    """The merged adapter of every seed: one and the same if the method draws nothing."""
    if not way.seeded:
        return [way.merged(adapters, 0)] * seeds
    return [way.merged(adapters, seed) for seed in range(seeds)]


def measure(
    model,
    tokenizer,
    ways: Mapping[str, Sequence[lk.LoraAdapter | None]],
    skills: Sequence[str],
    wanted: Settings,
    on_answers: Callable[[int], None],
) -> dict[str, dict[str, list[float]]]:
    """Exact match by way, skill and seed; `ways` are adapters by seed, None for the base model."""
    seeds = range(wanted.seeds)
    questions = {skill: [held_out_items(skill, wanted.count, seed) for seed in seeds] for skill in skills}
    return ask(model, tokenizer, ways, questions, on_answers)


def ask(
    model,
    tokenizer,
    ways: Mapping[str, Sequence[lk.LoraAdapter | None]],
    questions: Mapping[str, Sequence[list[Item]]],
    on_answers: Callable[[int], None],
) -> dict[str, dict[str, list[float]]]:
    """Exact match by way, kind of question and seed; both arguments hold a list by seed, None for the base model.

    Each row of a batch has its own adapter. Rows of one way are neighbours: what fails, fails early and together.
    """
    slots: dict[str, lk.LoraAdapter] = {}
    slot_of = {}
    for way, of_seeds in ways.items():
        for seed, adapter in enumerate(of_seeds):
            slot = way if adapter is of_seeds[0] else f"{way} / {seed}"
            slot_of[way, seed] = None if adapter is None else slot
            if adapter is not None:
                slots[slot] = adapter
    scores: dict[str, dict[str, list[float]]] = {way: {kind: [] for kind in questions} for way in ways}
    attached = attach(model, slots)
    try:
        for kind, of_seeds in questions.items():
            for seed, items in enumerate(of_seeds):
                rows = [(slot_of[way, seed], item) for way in ways for item in items]
                replies = answers(attached, tokenizer, rows, on_answers)
                for place, way in enumerate(ways):
                    own = replies[place * len(items) : (place + 1) * len(items)]
                    scores[way][kind].append(exact_match(own, items))
    finally:
        attached.detach()
    return scores


class Replies:
    """Reads the replies of a batch; as a stopping criterion it ends those that are not the right one's beginning."""

    def __init__(self, tokenizer, start: int, right: Sequence[str]) -> None:
        self.tokenizer, self.start, self.right = tokenizer, start, right

    def read(self, tokens: torch.Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(tokens[:, self.start :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def __call__(self, tokens: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        pairs = zip(self.read(tokens), self.right, strict=True)
        return torch.tensor([not right.startswith(reply) for reply, right in pairs])


def answers(
    attached, tokenizer, rows: Sequence[tuple[str | None, Item]], on_answers: Callable[[int], None]
) -> list[str]:
    """The greedy answer of every row's own adapter, cut off where it can no longer be the right one."""
    longest = max(len(tokenizer(answer).input_ids) for _, (_, answer) in rows)
    out: list[str] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = [format_prompt(prompt) for _, (prompt, _) in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        replies = Replies(tokenizer, inputs.input_ids.shape[1], [answer for _, (_, answer) in batch])
        with torch.inference_mode(), attached.use([slot for slot, _ in batch]):
            tokens = attached.model.generate(
                **inputs, max_new_tokens=longest + SPARE_TOKENS, do_sample=False, stopping_criteria=[replies]
            )
        out += replies.read(tokens)
        on_answers(len(batch))
    return out


def total(wanted: Settings) -> int:
    """How many answers there are in all."""
    alone = 2 * len(wanted.skills)
    return (alone + len(WAYS) * sum(map(len, wanted.sets))) * wanted.count * wanted.seeds
