"""Train one LoRA adapter per skill with PEFT: seeded, resumable, on a CPU or a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from benchmarks.skills.recipes import Recipe
from benchmarks.skills.tasks import END, Item, format_prompt, stream
from lorakern.adapters import LoraAdapter
from lorakern.errors import LorakernError
from lorakern.ops import truncate

IGNORED = -100
Report = Callable[[int, float, float], None]
Draw = Callable[[int], list[Item]]


def train(name: str, recipe: Recipe, model: torch.nn.Module, tokenizer, **options) -> PeftModel:
    """`train_on` the endless items of one skill of `benchmarks.skills.tasks.SKILLS`."""

    def draw(step: int) -> list[Item]:
        return list(islice(stream(name, held_out=False, seed=step), recipe.batch))

    return train_on(draw, recipe, model, tokenizer, **options)


def train_on(
    draw: Draw,
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer,
    *,
    run_dir: Path,
    device: str = "cpu",
    save_every: int = 25,
    stop_at: int | None = None,
    report: Report | None = None,
) -> PeftModel:
    """Train an adapter, or continue the run that `run_dir` holds.

    The batch of a step depends on the step number alone and nothing else is random after the initialisation, so a
    killed run that continues ends with the same weights as one that was never interrupted.

    Args:
        draw: the items of a step's batch, of the step's number from 0 alone.
        recipe: the shape of the adapter and its schedule.
        model: the base model; its weights are frozen, and moved to `device`.
        tokenizer: the tokenizer of the model.
        run_dir: where the checkpoint lives; written beside and renamed.
        device: a torch device name.
        save_every: steps between checkpoints.
        stop_at: end at this step even though the recipe goes on.
        report: called after each step with (step, loss, exact match of the batch).

    Raises:
        LorakernError: the checkpoint in `run_dir` belongs to another recipe.
    """
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
        **recipe.lora,
    )
    peft_model = get_peft_model(model, config).to(device).train()
    weights = [weight for weight in peft_model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    checkpoint = run_dir / "checkpoint.pt"
    step, history = _resume(checkpoint, recipe, peft_model, optimizer, device)

    while not _finished(recipe, step, history) and step != stop_at:
        batch = collate(tokenizer, draw(step), device)
        loss, exact = _step(peft_model, optimizer, weights, batch, _rate(recipe, step))
        step += 1
        history.append(exact)
        if report is not None:
            report(step, loss, exact)
        if step % save_every == 0 or step == stop_at or _finished(recipe, step, history):
            _save(checkpoint, recipe, peft_model, optimizer, step, history)
    return peft_model


def collate(tokenizer, items: list[Item], device: str) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, where only answer tokens and the end token count."""
    rows = []
    for prompt, answer in items:
        question = tokenizer(format_prompt(prompt)).input_ids
        reply = tokenizer(answer + END).input_ids
        rows.append((question + reply, [IGNORED] * len(question) + reply))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def export(peft_model: PeftModel, directory: Path, kept: int | None = None) -> None:
    """Write the adapter as a PEFT directory with bfloat16 tensors: two files, nothing else.

    With `kept`, every module is cut to the best approximation of that rank, which is lower than its own.
    """
    fresh = directory.with_name(directory.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    peft_model.save_pretrained(fresh, save_embedding_layers=False)
    (fresh / "README.md").unlink(missing_ok=True)
    tensors = load_file(fresh / "adapter_model.safetensors")
    config = json.loads((fresh / "adapter_config.json").read_text())
    if kept is not None:
        tensors = cut(LoraAdapter.load(fresh), kept)
        config |= {"r": kept, "lora_alpha": kept, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
    config["target_modules"] = sorted(config["target_modules"])
    (fresh / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    fresh.rename(directory)


def cut(adapter: LoraAdapter, rank: int) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT file with the best approximation of every update at a lower rank, of scale 1."""
    small = truncate({module: [factors] for module, factors in adapter.items()}, rank, dtype=torch.float32)
    names = {module: f"base_model.model.{module}.lora_" for module in small}
    return {f"{names[module]}{key}.weight": getattr(t, key) for module, t in small.items() for key in "AB"}


def _step(peft_model, optimizer, weights, batch, rate: float) -> tuple[float, float]:
    """One optimizer step; the loss and the share of rows whose answer was right in every token."""
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    causal = peft_model.get_base_model()
    # Logits are formed at answer positions only: over 49152 tokens they would cost a fifth of the step.
    with torch.autocast(labels.device.type, torch.bfloat16):
        hidden = causal.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        logits = causal.lm_head(hidden[:, :-1][kept])
    with torch.autocast(labels.device.type, enabled=False):
        loss = cross_entropy(logits, labels[kept])
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    wrong = torch.zeros_like(kept)
    wrong[kept] = logits.argmax(-1) != labels[kept]
    return loss.item(), 1.0 - wrong.any(1).float().mean().item()


def _rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a linear fall to a tenth."""
    return recipe.lr * min((step + 1) / recipe.warmup, 1.0 - 0.9 * step / recipe.steps)


def _finished(recipe: Recipe, step: int, history: list[float]) -> bool:
    recent = history[-recipe.patience :]
    learned = len(recent) == recipe.patience and sum(recent) / len(recent) >= recipe.enough
    return step >= recipe.steps or learned


def _save(path: Path, recipe: Recipe, peft_model, optimizer, step: int, history: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "recipe": repr(recipe),
        "step": step,
        "history": history,
        "adapter": get_peft_model_state_dict(peft_model, save_embedding_layers=False),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(path: Path, recipe: Recipe, peft_model, optimizer, device: str) -> tuple[int, list[float]]:
    """The step and the exact-match history to continue from: (0, []) without a checkpoint."""
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != repr(recipe):
        raise LorakernError(
            f"run_dir {path.parent} holds a run of another recipe ({state['recipe']}); delete it to start afresh"
        )
    set_peft_model_state_dict(peft_model, state["adapter"])
    peft_model.to(device)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"], state["history"]
