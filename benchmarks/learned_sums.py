"""How fast is the linear algebra of an IterIS sweep? `python -m benchmarks.learned_sums`.

Features of one block of SmolLM2 are recorded once, in the models of four skill adapters and in one merged of them. On
these, a sweep as the library makes it takes turns with the formula as it stands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import lorakern as lk
from benchmarks.command import report
from benchmarks.report import duration
from benchmarks.skills.iteris import texts
from benchmarks.timing import QUICK, Effort, in_turns
from lorakern.errors import LorakernError
from lorakern.integrations import smollm2
from lorakern.integrations.transformers import attach
from lorakern.merge.iteris.equations import Equations
from lorakern.merge.iteris.layers import Layer, find_layers
from lorakern.merge.iteris.products import Products

ADAPTERS = Path(__file__).parent / "skills" / "adapters"
SKILLS = ("answer_json", "iso_date", "initials", "sort_words")
# the linear layers of one block of thirty, those with the same input together
PLACE = ".layers.14."
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
SAMPLES = 50
BATCHES = (4, 25)  # texts in one
ALPHA = 1e-5
# of what the updates give on the samples, relative to those of float64 products
TOLERANCE = 1e-4
EFFORT = Effort(15.0, 5, 15)

# by group, by adapter: a batch's rows in the task model and in the merged one
Features = list[list[list[tuple[torch.Tensor, torch.Tensor]]]]


class Recorded(NamedTuple):
    """The layers of a block, those with the same input together, and what goes into each group."""

    groups: list[list[Layer]]
    features: Features

    @property
    def tokens(self) -> int:
        return sum(len(X) for rows in self.features[0] for X, _ in rows)


def ours(recorded: Recorded) -> dict[str, torch.Tensor]:
    """The updates of a sweep, as `lorakern.merge.iteris` makes them of these features."""
    updates = {}
    for group, features in zip(recorded.groups, recorded.features, strict=True):
        equations = {layer: Equations(layer, full=False) for layer in group}
        for i, batches in enumerate(features):
            products = Products(group[0].d_in, group[0].weight.device, same=False)
            for X, X_merged in batches:
                products.add(X, X_merged)
            C, G = products.finish()
            for each in equations.values():
                each.add(i, 1.0, ALPHA, C, G)
        for layer in group:
            updates[layer.name], _ = equations.pop(layer).solve(torch.finfo(torch.float32).eps)
    return updates


def naive(recorded: Recorded) -> dict[str, torch.Tensor]:
    """The formula as it stands: float64 sums of every adapter and layer, and a general solve of each layer."""
    updates = {}
    for group, features in zip(recorded.groups, recorded.features, strict=True):
        identity = torch.eye(group[0].d_in, dtype=torch.float64)
        for layer in group:
            left, right = torch.zeros_like(identity), torch.zeros(layer.weight.shape, dtype=torch.float64)
            for i, batches in enumerate(features):
                C, G = torch.zeros_like(identity), torch.zeros_like(identity)
                for X, X_merged in batches:
                    X, X_merged = X.double(), X_merged.double()
                    C += X.T @ X_merged
                    G += X_merged.T @ X_merged
                B, A = layer.parts(i)
                right += B @ A @ (C + ALPHA * C.norm() * identity)
                left += G + ALPHA * G.norm() * identity
            updates[layer.name] = torch.linalg.solve(left.T, right.T).T
    return updates


def record(batch: int, samples: int) -> Recorded:
    """Features of a block of the real model, of so many samples of each skill, so many in a batch."""
    model, tokenizer = smollm2.load()
    adapters = {skill: lk.LoraAdapter.load(ADAPTERS / skill) for skill in SKILLS}
    merged = lk.merge(list(adapters.values()), "cat", weights=[1 / len(adapters)] * len(adapters))
    known = {
        layer.name.rpartition(".")[2]: layer for layer in find_layers("bench", model, adapters) if PLACE in layer.name
    }
    groups = [[known[name] for name in group] for group in GROUPS]
    features: Features = [[[] for _ in adapters] for _ in groups]
    attached = attach(model, {**adapters, "merged": merged})
    for i, skill in enumerate(adapters):
        source = texts(skill, samples, 0)
        for first in range(0, samples, batch):
            given = tokenizer(source[first : first + batch], return_tensors="pt", padding=True, padding_side="right")
            pairs = zip(*(inputs(attached, name, groups, given) for name in (skill, "merged")), strict=True)
            for own, pair in zip(features, pairs, strict=True):
                own[i].append(pair)
    attached.detach()
    return Recorded(groups, features)


def inputs(attached, name: str, groups: Sequence[Sequence[Layer]], given: Mapping[str, torch.Tensor]) -> list:
    """What goes into each group in the model with that adapter, a row for each token that is no padding."""
    caught, mask = [], given["attention_mask"].bool().reshape(-1)

    def take(module, args):
        caught.append(args[0].reshape(-1, args[0].shape[-1])[mask])

    hooks = [group[0].module.register_forward_pre_hook(take) for group in groups]
    with torch.no_grad(), attached.use([name]):
        attached.model(**given, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return caught


def deviations(recorded: Recorded, found: Mapping, exact: Mapping) -> tuple[float, float]:
    """The largest relative difference of a layer's update, and of what it gives on the samples."""
    worst = [0.0, 0.0]
    for group, features in zip(recorded.groups, recorded.features, strict=True):
        rows = torch.cat([X_merged for batches in features for _, X_merged in batches]).double()
        for layer in group:
            wanted = exact[layer.name]
            difference = found[layer.name] - wanted
            outputs = float((rows @ difference.T).norm() / (rows @ wanted.T).norm())
            worst = [max(worst[0], float(difference.norm() / wanted.norm())), max(worst[1], outputs)]
    return worst[0], worst[1]


def measure(batch: int, samples: int, effort: Effort) -> dict:
    """Both on the same features."""
    recorded = record(batch, samples)
    updates, outputs = deviations(recorded, ours(recorded), naive(recorded))
    if outputs > TOLERANCE:
        raise LorakernError(f"bench: the sweep's updates are wrong by {outputs:.1e}; its speed means nothing")
    timed = in_turns({"ours": lambda: ours(recorded), "naive": lambda: naive(recorded)}, effort)
    known = {"case": "sums", "adapters": len(SKILLS), "texts": samples, "batch": batch, "tokens": recorded.tokens}
    return known | {**timed["ours"], "naive": timed["naive"], "updates": updates, "outputs": outputs}


def lines(record: Mapping) -> list[str]:
    """A record, as it is printed."""
    shape = f"{record['adapters']} adapters, {record['texts']} texts each in batches of {record['batch']}"
    theirs = record["naive"]["seconds"]
    return [
        f"IterIS sums and solve of one block, {shape}, {record['tokens']} tokens: {_spread(record)}",
        f"{'':11}in float64, layer by layer: {_spread(record['naive'])}, {theirs / record['seconds']:.2f} times ours",
        f"{'':11}updates differ by {record['updates']:.1e}, what they give on the samples by {record['outputs']:.1e}",
    ]


def _spread(summary: Mapping) -> str:
    return f"{duration(summary['seconds'])} (n = {summary['samples']}, least {duration(summary['min'])})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.learned_sums", description=__doc__.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="four texts a skill, one size of batches")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON lines")
    options = made.parse_args(arguments)
    effort = (4, QUICK) if options.quick else (SAMPLES, EFFORT)
    records = (measure(batch, *effort) for batch in BATCHES[: 1 if options.quick else None])
    return report("benchmarks.learned_sums", records, lines, options.json)


if __name__ == "__main__":
    sys.exit(main())
