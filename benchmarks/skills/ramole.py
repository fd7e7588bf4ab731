"""Requests that do not say which adapter they need: retrieval and every composition on the skill adapters."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.skills.evaluate import exact_match
from benchmarks.skills.results import Stored
from benchmarks.skills.tasks import Item, format_prompt, held_out_items, stream
from lorakern import LoraAdapter
from lorakern.mixture import (
    LoraRetriever,
    MiniLM,
    MixtureModel,
    Routers,
    retrieval_accuracy,
    train_encoder,
    train_router,
)
from lorakern.mixture.layers import MixtureLayers, tokens_of

K, SAMPLES, TRAIN_SHARE = 3, 20, 0.4
MODES = ("selection", "fusion", "mixture", "ramole", "arrow")
BASE, ORACLE = "base model", "oracle"
INSIDE, OUTSIDE = "in-distribution", "out-of-distribution"
# The modes that are also asked in smaller pools.
CURVES = ("mixture", "ramole")
ENCODERS = "as it is", "trained"
KS = (1, K)
# What the loss of the router is held against: gates that are all alike, and that are 1 for the own adapter.
MEAN, ALONE = REFERENCES = "mean of all", "own alone"
REFERENCE_EXAMPLES = 8
Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured: the skills of the pool, questions a skill, seeds, smaller pools, and what is trained how long.

    A seed draws the skills to train on, the samples, the questions, and the order in which a pool grows.
    """

    skills: tuple[str, ...]
    count: int
    seeds: int
    pools: tuple[int, ...]
    encoder_steps: int
    encoder_texts: int
    router_steps: int
    router_examples: int
    router_rank: int
    router_rate: float
    router_dropout: float
    router_empty: int

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(vars(self) | {"k": K, "samples": SAMPLES, "share": TRAIN_SHARE, "modes": MODES}))

    def trained(self, seed: int) -> list[str]:
        """The skills on which encoder and router are trained."""
        return sorted(random.Random(seed).sample(self.skills, round(TRAIN_SHARE * len(self.skills))))

    def pool(self, seed: int, size: int) -> list[str]:
        """The first skills of an order, so that pools grow."""
        return random.Random(f"pool {seed}").sample(self.skills, len(self.skills))[:size]


class Results(Stored):
    """A record for each seed that is measured, and the losses of its router."""

    kept: ClassVar = {"runs": list}

    def missing(self) -> list[int]:
        done = {run["seed"] for run in self.runs}
        return [seed for seed in range(self.settings.seeds) if seed not in done]


def run(results: Results, folder: Path, runs: Path, model, router_model, tokenizer, report: Report) -> None:
    """Measure what `results` lacks.

    Args:
        folder: of the adapters.
        runs: where half-trained routers and encoders are kept.
        model: bfloat16, which answers.
        router_model: float32, in which routers are trained.
        report: called with what is under way.
    """
    for seed in results.missing():
        results.runs.append(measured(results.settings, seed, folder, runs, model, router_model, tokenizer, report))
        results.save()


def measured(wanted: Settings, seed: int, folder: Path, runs: Path, model, router_model, tokenizer, report) -> dict:
    """The record of a seed."""
    trained = wanted.trained(seed)
    samples = {name: prompts(name, SAMPLES, seed + 1) for name in wanted.skills}
    questions = {name: held_out_items(name, wanted.count, seed) for name in wanted.skills}
    encoder = MiniLM()
    retrieval = {}
    for state in ENCODERS:
        report(f"seed {seed}: encoder {state}")
        if state == "trained":
            texts = {name: prompts(name, wanted.encoder_texts, seed + 1000) for name in trained}
            train_encoder(
                encoder, texts, steps=wanted.encoder_steps, seed=seed, state=runs / f"encoder-{seed}", save_every=1000
            )
        retrieval[state] = accuracies(encoder, samples, questions, trained)
    retriever_of = LoraRetriever(encoder)
    for name, texts in samples.items():
        retriever_of.add(name, texts)
    adapters = {name: LoraAdapter.load(folder / name) for name in wanted.skills}
    examples = mixed(trained, wanted.router_examples, seed)
    routers, losses = train_router(
        router_model,
        {name: adapters[name] for name in trained},
        examples,
        tokenizer=tokenizer,
        rank=wanted.router_rank,
        steps=wanted.router_steps,
        lr=wanted.router_rate,
        dropout=wanted.router_dropout,
        empty=wanted.router_empty,
        seed=seed,
        state=runs / f"router-{seed}",
        save_every=20,
        progress=lambda done, total, loss: report(f"seed {seed}: router {done}/{total} {loss:.3f}"),
    )
    record = {"seed": seed, "trained": trained, "retrieval": retrieval, "losses": losses}
    record["references"] = references(router_model, {name: adapters[name] for name in trained}, examples, tokenizer)
    scores = answered(wanted, seed, samples, questions, folder, routers, encoder, model, tokenizer, report)
    return record | scores


def references(model, adapters: Mapping[str, LoraAdapter], examples: list[dict[str, str]], tokenizer) -> dict:
    """The loss of an answer's tokens with all adapters alike and with its own alone, over a few examples of each."""
    layers = MixtureLayers(model, "mixture", len(adapters))
    sums = dict.fromkeys(REFERENCES, 0.0)
    count = 0
    for slot, (name, adapter) in enumerate(adapters.items()):
        layers.load(slot, name, layers.fit("references", name, adapter))
    for slot in range(len(adapters)):
        first = slot * len(examples) // len(adapters)
        for example in examples[first : first + REFERENCE_EXAMPLES]:
            prompt = tokenizer(example["prompt"])["input_ids"]
            answer = [*tokenizer(example["answer"])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            count += len(answer)
            for way, row in ((MEAN, range(len(adapters))), (ALONE, (slot,))):
                tokens = tokens_of([list(row)], [ids.shape[1]], width=len(adapters), slots=len(adapters))
                with torch.no_grad(), layers.run(tokens):
                    sums[way] += model(ids, labels=labels, use_cache=False).loss.item() * len(answer)
    layers.close()
    return {way: total / count for way, total in sums.items()}


def accuracies(encoder, samples: Mapping[str, Sequence[str]], questions: Mapping[str, list[Item]], trained) -> dict:
    """Top-k accuracy for the skills trained on and the others."""
    retriever = LoraRetriever(encoder)
    for name, texts in samples.items():
        retriever.add(name, texts)
    out = {}
    for group, inside in (("trained", True), ("unseen", False)):
        queries = {n: [p for p, _ in items] for n, items in questions.items() if (n in trained) == inside}
        out[group] = {str(k): share for k, share in retrieval_accuracy(retriever, queries, ks=KS).items()}
    return out


def answered(wanted, seed, samples, questions, folder, routers: Routers, encoder, model, tokenizer, report) -> dict:
    """Exact match of every mode by skill, in the whole pool and in smaller ones; the router's gates of own adapters."""
    exact: dict[str, dict[str, dict[str, float]]] = {}
    pools: dict[str, dict[str, float]] = {}
    own: dict[str, float] = {}
    for mode in MODES:
        for size in (*(wanted.pools if mode in CURVES else ()), len(wanted.skills)):
            pool = wanted.pool(seed, size)
            whole = size == len(wanted.skills)
            retriever = LoraRetriever(encoder)
            with MixtureModel(
                model, retriever, tokenizer=tokenizer, mode=mode, k=K, routers=routers if mode == "ramole" else None
            ) as mixture:
                for name in pool:
                    mixture.add(name, folder / name, samples[name])
                report(f"seed {seed}: {mode}, {size} adapters")
                found = replies(mixture, {name: questions[name] for name in pool})
                inside = matched(found, questions)
                pools.setdefault(str(size), {})[mode] = statistics.mean(inside.values())
                if not whole:
                    continue
                exact.setdefault(mode, {})[INSIDE] = inside
                if mode == "ramole":
                    own = {name: statistics.mean(g.adapters.get(name, 0.0) for g in row) for name, row in found.items()}
                report(f"seed {seed}: {mode}, own adapter removed")
                exact[mode][OUTSIDE] = matched(replies(mixture, questions, exclude=True), questions)
                if mode == "selection":
                    report(f"seed {seed}: {ORACLE} and {BASE}")
                    exact[ORACLE] = {INSIDE: matched(replies(mixture, questions, pinned=True), questions)}
                    exact[BASE] = {INSIDE: matched(replies(mixture, questions, pinned=False), questions)}
    return {"exact": exact, "pools": pools, "own": own}


def replies(mixture: MixtureModel, questions: Mapping[str, list[Item]], exclude=False, pinned: bool | None = None):
    """For each skill what the mixture answers; `pinned`: its own adapter or none, in place of those retrieved."""
    asked = [(name, prompt) for name, items in questions.items() for prompt, _ in items]
    adapters = None if pinned is None else [name if pinned else () for name, _ in asked]
    found = iter(
        mixture.generate(
            [format_prompt(prompt) for _, prompt in asked],
            queries=[prompt for _, prompt in asked],
            adapters=adapters,
            exclude=[name for name, _ in asked] if exclude else None,
            max_new_tokens=48,
        )
    )
    return {name: list(islice(found, len(items))) for name, items in questions.items()}


def matched(found: Mapping[str, list], questions: Mapping[str, list[Item]]) -> dict[str, float]:
    return {name: exact_match([row.text for row in rows], questions[name]) for name, rows in found.items()}


def prompts(name: str, count: int, seed: int) -> list[str]:
    """Prompts of the training split."""
    return [prompt for prompt, _ in islice(stream(name, held_out=False, seed=seed), count)]


def mixed(names: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Training questions of these skills, as the router is trained on them."""
    return [
        {"prompt": format_prompt(prompt), "answer": answer}
        for name in names
        for prompt, answer in islice(stream(name, held_out=False, seed=seed + 2000), count)
    ]
