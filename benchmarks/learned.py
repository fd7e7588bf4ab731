"""What do merges that learn cost? `python -m benchmarks.learned`, on SmolLM2-135M with two or more adapters.

A step of LoRA Soups beside a plain forward and backward with one LoRA of the same total rank; a candidate of LoraHub
beside PEFT's; IterIS's memory beside its sums. Its solve is the question of `benchmarks.learned_sums`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lorakern as lk
from benchmarks import learned_memory
from benchmarks.command import report
from benchmarks.report import duration
from benchmarks.timing import Effort, in_turns
from lorakern.integrations import smollm2
from lorakern.integrations.gated import GatedModel
from lorakern.merge import lorahub
from lorakern.merge.soups import loss_of

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # those of the LoRA Soups paper
RANK = 16
STEPS = [("float32", 2, 32), ("float32", 2, 256), ("bfloat16", 2, 32), ("bfloat16", 2, 256), ("bfloat16", 4, 256)]
SEARCHES = [("bfloat16", 4), ("bfloat16", 10), ("float32", 4)]
ROWS, CANDIDATES, EXAMPLES, LENGTH = 6, 40, 5, 32
EFFORT = Effort(12.0, 3, 9)


def adapters_for(model: torch.nn.Module, count: int) -> list[lk.LoraAdapter]:
    """Adapters of one rank with random factors; what they compute is of no importance here."""
    generator = torch.Generator().manual_seed(0)
    layers = {n: m.weight for n, m in model.named_modules() if n.endswith(TARGETS)}

    def factors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        d_out, d_in = weight.shape
        A, B = torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator)
        return A * 0.02, B * 0.02, 1.0

    return [
        lk.LoraAdapter({n: factors(w) for n, w in layers.items()}, base_model_name_or_path=smollm2.BASE_MODEL)
        for _ in range(count)
    ]


def tokens(model: torch.nn.Module, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch without padding whose every token counts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def cat_step(dtype: str, count: int, length: int) -> dict:
    """A step of the gates, optimizer included, and the forward and backward of PEFT's LoRA without one."""
    from peft import LoraConfig, get_peft_model

    model, _ = smollm2.load(getattr(torch, dtype))
    rival_model, _ = smollm2.load(getattr(torch, dtype))
    config = LoraConfig(r=count * RANK, target_modules=list(TARGETS), lora_dropout=0.0)
    # as a model is trained: the factors have its dtype
    rival = get_peft_model(rival_model, config, autocast_adapter_dtype=False).eval()
    batch = tokens(model, ROWS, length)
    with GatedModel("bench", model, adapters_for(model, count)) as gated:
        theta = torch.zeros(gated.held.shape, requires_grad=True)
        optimizer = torch.optim.AdamW([theta], lr=1e-4, weight_decay=0.0)

        def ours() -> None:
            optimizer.zero_grad()
            gated.gates = theta.softmax(1)
            loss_of(model, batch).backward()
            optimizer.step()

        def theirs() -> None:
            rival.zero_grad()
            rival(**batch, use_cache=False).loss.backward()

        timed = in_turns({"ours": ours, "rival": theirs}, EFFORT)
    record = {"case": "cat", "dtype": dtype, "adapters": count, "rank": RANK, "tokens": [ROWS, length]}
    return record | {**timed["ours"], "rival_seconds": timed["rival"]["seconds"]}


def candidate(dtype: str, count: int) -> dict:
    """A weight vector scored by LoraHub's search, and by PEFT's add_weighted_adapter and a forward."""
    from peft import LoraConfig, get_peft_model

    model, _ = smollm2.load(getattr(torch, dtype))
    rival_model, _ = smollm2.load(getattr(torch, dtype))
    adapters = adapters_for(model, count)
    batch = tokens(model, EXAMPLES, LENGTH)
    names = [f"a{i}" for i in range(count)]
    config = LoraConfig(r=RANK, target_modules=list(TARGETS))
    rival = get_peft_model(rival_model, config, adapter_name=names[0], autocast_adapter_dtype=False).eval()
    for name in names[1:]:
        rival.add_adapter(name, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(2)

    def theirs(kind: str) -> Callable[[], None]:
        def score() -> None:
            weights = torch.rand(count, generator=generator).tolist()
            rival.base_model.add_weighted_adapter(names, weights, "merged", combination_type=kind)
            rival.base_model.set_adapter("merged")
            with torch.no_grad():
                rival(**batch, use_cache=False)
            rival.base_model.set_adapter(names[0])
            rival.base_model.delete_adapter("merged")

        return score

    def ours(combine: str) -> Callable[[], None]:
        # the whole search, with all that it prepares, divided by its candidates
        return lambda: lorahub.search(model, adapters, [batch], combine=combine, budget=CANDIDATES)

    functions = {
        "ours": ours("lorahub_linear"),
        "ours, cat": ours("cat"),
        "linear": theirs("linear"),
        "cat": theirs("cat"),
    }
    timed = in_turns(functions, EFFORT)
    record = {
        "case": "lorahub",
        "dtype": dtype,
        "adapters": count,
        "rank": RANK,
        "tokens": [EXAMPLES, LENGTH],
        **timed["ours"],
    }
    record |= {"seconds": timed["ours"]["seconds"] / CANDIDATES, "candidates": CANDIDATES}
    record |= {"cat_seconds": timed["ours, cat"]["seconds"] / CANDIDATES}
    return record | {"rival_linear": timed["linear"]["seconds"], "rival_cat": timed["cat"]["seconds"]}


def measure(quick: bool) -> Iterator[dict]:
    """One record after the other."""
    for case in STEPS[: 1 if quick else None]:
        yield cat_step(*case)
        gc.collect()
    for case in SEARCHES[: 1 if quick else None]:
        yield candidate(*case)
        gc.collect()
    for limit in (None,) if quick else (None, 400_000_000):
        yield learned_memory.memory(limit, 4 if quick else 50)


def lines(record: Mapping[str, Any]) -> list[str]:
    """A record, as it is printed."""
    return {"cat": _cat, "lorahub": _lorahub, "memory": _memory}[record["case"]](record)


def _cat(record: Mapping[str, Any]) -> list[str]:
    rows, length = record["tokens"]
    case = f"{record['adapters']} adapters of rank {record['rank']}, {rows} x {length} tokens, {record['dtype']}"
    ratio = record["seconds"] / record["rival_seconds"]
    plain = f"forward and backward of one LoRA of rank {record['adapters'] * record['rank']} (PEFT)"
    return [
        f"CAT step, {case}: {duration(record['seconds'])}",
        f"{'':11}{plain} {duration(record['rival_seconds'])}: {ratio:.2f}",
    ]


def _lorahub(record: Mapping[str, Any]) -> list[str]:
    rows, length = record["tokens"]
    case = f"{record['adapters']} adapters of rank {record['rank']}, {rows} x {length} tokens, {record['dtype']}"
    linear, cat = record["rival_linear"] / record["seconds"], record["rival_cat"] / record["cat_seconds"]
    theirs = f"linear {duration(record['rival_linear'])}, cat {duration(record['rival_cat'])}"
    return [
        f"LoraHub candidate, {case}: {duration(record['seconds'])}, no cross terms {duration(record['cat_seconds'])}",
        f"{'':11}PEFT's add_weighted_adapter and forward: {theirs}: {linear:.1f} and {cat:.1f} times ours",
    ]


def _memory(record: Mapping[str, Any]) -> list[str]:
    limit = "no max_memory" if record["max_memory"] is None else f"max_memory {record['max_memory'] / 1e6:.0f} MB"
    over, sums = record["peak"] - record["base"], record["sums"]
    told = f"{over / sums:.2f} times the {sums / 1e6:.0f} MB of the largest group's sums"
    return [
        f"IterIS memory, {limit}: peak {record['peak'] / 1e6:.0f} MB, the model alone {record['base'] / 1e6:.0f} MB",
        f"{'':11}{over / 1e6:.0f} MB above it, {told}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.learned", description=__doc__.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="one case of each, on few samples")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON lines")
    options = made.parse_args(arguments)
    return report("benchmarks.learned", measure(options.quick), lines, options.json)


if __name__ == "__main__":
    sys.exit(main())
