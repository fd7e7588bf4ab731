"""Score the shipped adapters: exact match of greedy answers on held-out items, with and without the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.skills.tasks import Item, format_prompt, held_out_items

MAX_NEW_TOKENS = 32
PROMPTS_PER_SKILL = 4


def answers(
    model: torch.nn.Module,
    tokenizer,
    items: list[Item],
    *,
    batch: int = 50,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The greedy answers of a model to the prompts of `items`, generated in left-padded batches.

    An answer that does not end with the end-of-turn token within 32 tokens is returned as it stands then.
    """
    out: list[str] = []
    for start in range(0, len(items), batch):
        texts = [format_prompt(prompt) for prompt, _ in items[start : start + batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        replies = tokens[:, inputs.input_ids.shape[1] :]
        out += [text.strip() for text in tokenizer.batch_decode(replies, skip_special_tokens=True)]
        if on_batch is not None:
            on_batch(len(out))
    return out


def exact_match(replies: list[str], items: list[Item]) -> float:
    """The share of replies that equal the answer character for character.

    Example:
        >>> exact_match(["a b", "c"], [("1", "a b"), ("2", "C")])
        0.5
    """
    return sum(reply == answer for reply, (_, answer) in zip(replies, items, strict=True)) / len(items)


def score(
    model: torch.nn.Module,
    tokenizer,
    name: str,
    directory: Path,
    *,
    count: int = 200,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """One row of the table of scores: the adapter's shape, both exact matches and one example.

    Args:
        model: the base model in float32; it is left as it was.
        tokenizer: the tokenizer of the model.
        name: the skill.
        directory: the PEFT directory of the adapter.
        count: how many held-out items are asked.
        on_batch: called with the number of items done, which runs to `2 * count`.
    """
    items = held_out_items(name, count)
    report = on_batch or (lambda done: None)
    base = answers(model, tokenizer, items, on_batch=report)
    adapted = PeftModel.from_pretrained(model, directory)
    try:
        replies = answers(adapted, tokenizer, items, on_batch=lambda done: report(count + done))
    finally:
        adapted.unload()
    config = json.loads((directory / "adapter_config.json").read_text())
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
    return {key: config[key] for key in keys} | {
        "bytes": (directory / "adapter_model.safetensors").stat().st_size,
        "items": count,
        "base_exact_match": exact_match(base, items),
        "adapter_exact_match": exact_match(replies, items),
        "example": {"prompt": items[0][0], "answer": items[0][1], "base": base[0], "adapter": replies[0]},
    }


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as a Markdown page."""
    lines = [
        "# Skill adapters of SmolLM2-135M-Instruct",
        "",
        "Exact match of greedy answers on held-out items, base model and adapter with the same prompt, in float32;",
        "the adapters are scored as shipped, rounded to bfloat16 and, where `recipes.py` says so, cut to a lower rank",
        "than they were trained at. Written by `python -m benchmarks.skills eval`.",
        "",
        "| skill | rank | alpha | targets | items | base | adapter | example prompt | answer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in scores.items():
        alpha = f"{row['lora_alpha']} (rsLoRA)" if row["use_rslora"] else str(row["lora_alpha"])
        rank = _with_pattern(str(row["r"]), row["rank_pattern"])
        targets = " ".join(target.removesuffix("_proj") for target in row["target_modules"])
        example = row["example"]
        lines.append(
            f"| {name} | {rank} | {_with_pattern(alpha, row['alpha_pattern'])} | {targets} | {row['items']} "
            f"| {row['base_exact_match']:.1%} | {row['adapter_exact_match']:.1%} "
            f"| {example['prompt']} | `{example['answer']}` |"
        )
    total = sum(row["bytes"] for row in scores.values())
    return "\n".join([*lines, "", f"All adapters together: {total / 1e6:.2f} MB.", ""])


def demo_prompts(names: list[str]) -> dict[str, list[dict[str, str]]]:
    """For each skill four held-out items as the model reads them: `{"prompt": formatted text, "answer": ...}`."""
    return {
        name: [
            {"prompt": format_prompt(prompt), "answer": answer}
            for prompt, answer in held_out_items(name, PROMPTS_PER_SKILL)
        ]
        for name in names
    }


def _with_pattern(default: str, pattern: dict[str, int]) -> str:
    return ", ".join([default, *(f"{module.removesuffix('_proj')} {value}" for module, value in pattern.items())])
