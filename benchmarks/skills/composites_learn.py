"""The ways to compose two skills that learn from data: LoraHub, CAT, and LoRAs trained for the purpose."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lorakern as lk
from benchmarks.skills.composites import Composite
from benchmarks.skills.recipes import RECIPES, Recipe
from benchmarks.skills.tasks import END, Item, different, format_prompt, stream
from lorakern.merge import lorahub, soups

Facts = dict[str, Any]
BATCH, CAT_WARMUP, RANK_TO_ALPHA = 8, 4, 2


@dataclass(frozen=True)
class Budget:
    """What a learned way may use, in batches of 8.

    `examples` questions of the composite, or half as many of each skill for CAT on the skills' data, which CAT goes
    over `cat_epochs` times at a rate of `cat_rate` and a LoRA `lora_epochs` times; `shots` of them and `candidates` to
    score for LoraHub. The data-mix LoRA has new questions of the skills at every one of `mix_steps` steps at most.
    """

    examples: int = 64
    shots: int = 8
    candidates: int = 40
    cat_rate: float = 0.1
    cat_epochs: int = 4
    lora_epochs: int = 8
    mix_steps: int = 200


@dataclass(frozen=True)
class Lesson:
    """What a learned way is given: the task, its two adapters, the model, and a seed for all that is drawn."""

    composite: Composite
    adapters: tuple[lk.LoraAdapter, lk.LoraAdapter]
    seed: int
    budget: Budget
    model: Any
    tokenizer: Any
    folder: Path
    report: Callable[[str], None]

    def of_composite(self, count: int) -> list[Item]:
        """Different questions of the composite from its training split."""
        return different(self.composite.stream(held_out=False, seed=self.seed), count)

    def of_skills(self, count: int) -> list[Item]:
        """Different questions of the two skills from their training splits, half of each."""
        halves = (
            different(stream(skill, held_out=False, seed=self.seed), count // 2) for skill in self.composite.skills
        )
        return [item for pair in zip(*halves, strict=True) for item in pair]


Learned = tuple[lk.LoraAdapter, Facts]


def hub(lesson: Lesson, combine: str) -> Learned:
    """LoraHub with its published bounds and L1 term, a few questions of the composite, and the optimizer there is."""
    found = lorahub.search(
        lesson.model,
        lesson.adapters,
        records(lesson.of_composite(lesson.budget.shots)),
        tokenizer=lesson.tokenizer,
        combine=combine,
        optimizer=getattr(lorahub, optimizer_name()),
        budget=lesson.budget.candidates,
        batch_size=BATCH,
        seed=lesson.seed,
        progress=lambda done, total, score: lesson.report(f"candidate {done}/{total} {score:.2f}"),
    )
    return found.adapter(), {"weights": list(found.weights), "loss": found.score, "first loss": found.trace[0][1]}


def cat(lesson: Lesson, parametrisation: str, init: str | list[float], composite: bool) -> Learned:
    """CAT of LoRA Soups on questions of the composite, or of its skills."""
    count = lesson.budget.examples
    soup = soups.learn(
        lesson.model,
        lesson.adapters,
        records(lesson.of_composite(count) if composite else lesson.of_skills(count)),
        tokenizer=lesson.tokenizer,
        parametrisation=parametrisation,
        init=init,
        lr=lesson.budget.cat_rate,
        epochs=lesson.budget.cat_epochs,
        batch_size=BATCH,
        warmup=CAT_WARMUP,
        seed=lesson.seed,
        progress=lambda done, total, loss: lesson.report(f"step {done}/{total} {loss:.2f}"),
    )
    means = []
    for place, adapter in enumerate(lesson.adapters):
        own = [weights[place].item() for module, weights in soup.weights.items() if module in adapter]
        means.append(sum(own) / len(own))
    return soup.merged, {"weights": means, "loss": soup.losses[-1], "first loss": soup.losses[0]}


def lora(lesson: Lesson, composite: bool) -> Learned:
    """A new LoRA with the sum of the ranks: on the examples that CAT has, or on new questions of both skills."""
    from benchmarks.skills.train import export, train_on

    budget = lesson.budget
    recipe = combined(lesson.composite.skills, budget.mix_steps, lesson.seed)
    draw = partial(mixed_batch, lesson.composite.skills, lesson.seed, recipe.batch)
    if composite:
        items = lesson.of_composite(budget.examples)
        steps = max(1, budget.lora_epochs * len(items) // recipe.batch)
        recipe = combined(lesson.composite.skills, steps, lesson.seed)
        draw = partial(epoch_batch, items, lesson.seed, recipe.batch)
    facts: Facts = {}

    def report(step: int, loss: float, exact: float) -> None:
        facts.update({"steps": step, "loss": loss} | ({"first loss": loss} if step == 1 else {}))
        lesson.report(f"step {step}/{recipe.steps} {loss:.2f}")

    trainable = {name: weight.requires_grad for name, weight in lesson.model.named_parameters()}
    trained = train_on(draw, recipe, lesson.model, lesson.tokenizer, run_dir=lesson.folder / "run", report=report)
    try:
        export(trained, lesson.folder / "trained")
    finally:
        trained.unload().eval()
        # Frozen bfloat16 weights would take torch's slower matmul on a CPU, in all answers from here on.
        for name, weight in lesson.model.named_parameters():
            weight.requires_grad_(trainable[name])
    return lk.LoraAdapter.load(lesson.folder / "trained"), facts


def combined(skills: tuple[str, str], steps: int, seed: int) -> Recipe:
    """The recipe of one LoRA that has the modules of both skills, each with the sum of the ranks it has in them."""
    ranks: dict[str, int] = {}
    for recipe in (RECIPES[skill] for skill in skills):
        for target in recipe.targets:
            ranks[target] = ranks.get(target, 0) + recipe.lora.get("rank_pattern", {}).get(target, recipe.rank)
    rank = max(ranks.values())
    alphas = {target: RANK_TO_ALPHA * own for target, own in ranks.items()}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return Recipe(rank, RANK_TO_ALPHA * rank, tuple(ranks), steps, batch=BATCH, seed=seed, lora=patterns)


def mixed_batch(skills: tuple[str, str], seed: int, size: int, step: int) -> list[Item]:
    """The batch of a step, half of each skill: new questions at every step, other ones for every seed."""
    own = 1_000_003 * seed + step
    return [item for skill in skills for item in islice(stream(skill, held_out=False, seed=own), size // 2)]


def epoch_batch(items: list[Item], seed: int, size: int, step: int) -> list[Item]:
    """The batch of a step that goes over the items in an order that is new in every epoch."""
    epoch, place = divmod(step * size, len(items))
    order = random.Random(f"{seed}/{epoch}").sample(range(len(items)), len(items))
    return [items[i] for i in order[place : place + size]]


def records(items: list[Item]) -> list[dict[str, str]]:
    """Items as `lorakern.merge.soups.learn` takes them."""
    return [{"prompt": format_prompt(prompt), "answer": answer + END} for prompt, answer in items]


def optimizer_name() -> str:
    """LoraHub's own optimizer where it is installed, else lorakern's."""
    return "nevergrad" if importlib.util.find_spec("nevergrad") else "one_plus_one"


@contextmanager
def plain_attention(model) -> Iterator[None]:
    """On a CPU the fused attention's backward is slower than plain matmuls at these lengths."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


ONES = [1.0, 1.0]
LEARNED: dict[str, Callable[[Lesson], Learned]] = {
    "LoraHub": partial(hub, combine="lorahub_linear"),
    "LoraHub, cat": partial(hub, combine="cat"),
    "data-mix LoRA": partial(lora, composite=False),
    "CAT softmax, skills' data": partial(cat, parametrisation="softmax", init="zero", composite=False),
    "CAT free, skills' data": partial(cat, parametrisation="free", init=ONES, composite=False),
    "CAT softmax, composite examples": partial(cat, parametrisation="softmax", init="zero", composite=True),
    "CAT free, composite examples": partial(cat, parametrisation="free", init=ONES, composite=True),
    "LoRA on the composite examples": partial(lora, composite=True),
}
