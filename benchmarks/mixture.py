"""What does a mixture cost whole answers? `python -m benchmarks.mixture`.

16 prompts of the skills, each with another set of three of the 18 skill adapters, and as many new tokens for each:
`MixtureModel` in two modes, without any adapter, transformers' generate of the base model on the same batch, and what
one does without kernels for it: for each prompt merge its three adapters into the weights, generate alone, and take the
weights back. SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random

import torch

import lorakern as lk
from benchmarks.command import report
from benchmarks.skills.iteris import Folded
from benchmarks.skills.tasks import format_prompt, held_out_items
from benchmarks.timing import Effort, in_turns
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.integrations import smollm2
from lorakern.mixture import MixtureModel, Routers

ADAPTERS = Path(__file__).parent / "skills" / "adapters"
ROWS, K, NEW = 16, 3, 32
MERGED = 4  # rows of which the merging is timed: it takes one after the other, and long
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MODES = ("mixture", "ramole")
TARGETS = {"ramole / generate": 0.7, "mixture / generate": 0.7, "mixture / merging": 4.0}


def measure(dtype: str, rows: int, new: int, effort: Effort) -> dict:
    """Tokens a second of every way, and what the answers of the mixture agree in with those of merged weights."""
    model, tokenizer = smollm2.load(DTYPES[dtype])
    # every row has as many new tokens
    model.generation_config.eos_token_id = None
    tokenizer.eos_token, pad = None, tokenizer.eos_token_id
    model.generation_config.pad_token_id = pad
    tokenizer.pad_token_id = pad
    names = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))
    adapters = {name: lk.LoraAdapter.load(ADAPTERS / name) for name in names}
    prompts = [format_prompt(held_out_items(names[i % len(names)], 1, i)[0][0]) for i in range(rows)]
    sets = [[*Random(i).sample(names, K)] for i in range(rows)]
    if len(set(map(frozenset, sets))) < rows:
        raise LorakernError("bench: two rows have one set of adapters; a draw that has not is needed")
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    singles = [tokenizer([prompt], return_tensors="pt") for prompt in prompts]
    folded = Folded(model)

    def generate(inputs):
        return model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, inputs["input_ids"].shape[1] :]

    def merging(rows):
        out = []
        for inputs, chosen in zip(singles[:rows], sets[:rows], strict=True):
            merged = lk.merge([adapters[name] for name in chosen], method="cat", weights=[1 / K] * K)
            with folded.by(merged):
                out.append(generate(inputs)[0].tolist())
        return out

    mixtures = {
        mode: MixtureModel(
            model,
            tokenizer=tokenizer,
            mode=mode,
            k=K,
            routers=Routers.init(model, mode) if mode == "ramole" else None,
            max_rows=rows,
        )
        for mode in MODES
    }
    for mixture in mixtures.values():
        for name in names:
            mixture.add(name, adapters[name])

    def answers(mode, chosen):
        return [g.tokens for g in mixtures[mode].generate(prompts, adapters=chosen, max_new_tokens=new)]

    functions: dict[str, Callable[[], object]] = {
        "generate": lambda: generate(batch),
        "no adapter": lambda: answers("mixture", [()] * rows),
        "mixture": lambda: answers("mixture", sets),
        "ramole": lambda: answers("ramole", sets),
        "merging": lambda: merging(MERGED),
    }
    ours, merged = answers("mixture", sets), merging(rows)
    if not all(len(row) == new for row in ours):
        raise LorakernError(f"bench: rows have {show([len(row) for row in ours])} tokens, not {new}")
    # rounding parts them sooner or later; the first tokens tell whether it is one function
    first = sum(a[0] == b[0] for a, b in zip(ours, merged, strict=True))
    if first < 0.8 * rows:
        raise LorakernError(
            f"bench: only {first} of {rows} rows begin as with merged weights; a wrong result is not timed"
        )
    timed = {name: entry["seconds"] for name, entry in in_turns(functions, effort).items()}
    for mixture in mixtures.values():
        mixture.close()
    rate = {name: (MERGED if name == "merging" else rows) * new / seconds for name, seconds in timed.items()}
    ratios = {"ramole / generate": ("ramole", "generate"), "mixture / generate": ("mixture", "generate")}
    ratios |= {"mixture / merging": ("mixture", "merging"), "ramole / no adapter": ("ramole", "no adapter")}
    same = sum(a == b for a, b in zip(ours, merged, strict=True))
    return {
        "case": dtype,
        "tokens_per_second": rate,
        "ratios": {name: rate[a] / rate[b] for name, (a, b) in ratios.items()},
        "rows_as_merged": same,
        "rows": rows,
    }


def lines(record: Mapping) -> list[str]:
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in record["tokens_per_second"].items())
    out = [f"{record['case']}, {record['rows']} rows, tokens/s: {rates}"]
    for name, ratio in record["ratios"].items():
        target = TARGETS.get(name)
        verdict = "" if target is None else f" (target {target}: {'met' if ratio >= target else 'falls short'})"
        out.append(f"  {name}: {ratio:.2f}{verdict}")
    return [*out, f"  answers equal to those of merged weights: {record['rows_as_merged']} of {record['rows']}"]


def records(dtypes: list[str], rows: int, new: int, effort: Effort) -> Iterator[dict]:
    for dtype in dtypes:
        yield measure(dtype, rows, new, effort)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--new", type=int, default=NEW, help="tokens a row")
    parser.add_argument("--seconds", type=float, default=20.0, help="spent on each way")
    parser.add_argument("--json", type=Path, help="also write the records, one a line")
    options = parser.parse_args()
    effort = Effort(options.seconds, 3, 9)
    return report("benchmarks.mixture", records(options.dtypes, options.rows, options.new, effort), lines, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
