"""Contrastive fine-tuning of a sentence encoder on tasks, and how often a retriever finds the right adapter."""

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.mixture._checks import check_name, check_texts, prefixed
from lorakern.mixture.retriever import INSTRUCTION, LoraRetriever
from lorakern.mixture.training_state import TrainingState, digest

Progress = Callable[[int, int, float], None]


def train_encoder(
    encoder: torch.nn.Module,
    tasks: Mapping[str, Sequence[str]],
    *,
    steps: int = 100,
    batch_size: int = 16,
    temperature: float = 0.05,
    lr: float = 2e-5,
    warmup: int = 10,
    instruction: str = INSTRUCTION,
    seed: int = 0,
    progress: Progress | None = None,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 50,
) -> list[float]:
    """Pull embeddings of texts of one task together and push those of different tasks apart: InfoNCE.

    A step draws `batch_size` pairs (x_i, y_i), both of a task t_i, the tasks in turns, and takes a step of AdamW down

        ``L = -1/2n sum_i [log softmax_j(s_ij)_i + log softmax_j(s_ji)_i]``, ``s_ij = cos(E(I: x_i), E(I: y_j)) / tau``

    where the softmax leaves out the other pairs of the same task: they are no negatives. Dropout is off.

    Args:
        encoder: a module in float32 whose `embed(texts)` gives (n, d) with gradients, such as `MiniLM`; or, without
            `embed`, one that is called. All its parameters that require gradients are trained in place; adapters that
            a retriever holds are to be added anew with it.
        tasks: at least two tasks, by name, with at least two sample texts each.
        steps: steps in all, those of earlier runs with this `state` included.
        batch_size: pairs a step, at least 2.
        temperature: tau.
        lr: the learning rate after the warm-up.
        warmup: steps over which it rises linearly.
        instruction: I, what each text is prefixed with; that of the retriever.
        seed: of the draws.
        progress: called as progress(done, steps, loss) after each step.
        state: a folder that keeps the encoder and the optimizer; a call with the same arguments (`steps` and
            `save_every` may differ) goes on from there, to the same bits as one that was never stopped.
        save_every: steps between writes to `state`; the last step is always written.

    Returns:
        The loss of every step, before the step was taken.

    Raises:
        LorakernError: for arguments of another form, a state of other arguments, and a loss or gradient that is not
            finite: the encoder then has the weights before that step.

    LoraRetriever: arXiv 2402.09997; InfoNCE: arXiv 1807.03748.

    >>> import torch
    >>> from lorakern.mixture import train_encoder
    >>> class Letters(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         torch.manual_seed(0)
    ...         self.table = torch.nn.Embedding(128, 8)
    ...     def forward(self, texts):
    ...         return torch.stack([self.table(torch.tensor([ord(c) % 128 for c in text])).mean(0) for text in texts])
    >>> tasks = {"vowels": ["aei", "uio", "eau"], "digits": ["123", "487", "605"]}
    >>> losses = train_encoder(Letters(), tasks, steps=30, batch_size=4, lr=0.05, warmup=1)
    >>> len(losses), losses[-1] < losses[0] / 2
    (30, True)
    """
    _check_numbers(steps=steps, batch_size=batch_size, warmup=warmup, seed=seed, save_every=save_every)
    for name, value in (("temperature", temperature), ("lr", lr)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise LorakernError(f"{name} must be a positive number, got {show(value)}")
    if not isinstance(instruction, str):
        raise LorakernError(f"instruction must be text, got {show(instruction)}")
    samples = _checked_tasks(tasks)
    trained = _trained(encoder)
    embed = getattr(encoder, "embed", encoder)
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    arguments = {"batch_size": batch_size, "temperature": temperature, "lr": lr, "warmup": warmup}
    arguments |= {"instruction": instruction, "seed": seed, "tasks": digest(samples)}
    file = None if state is None else TrainingState(state, "train_encoder", arguments)
    losses = [] if file is None else file.load(encoder, trained, optimizer)
    if len(losses) > steps:
        raise LorakernError(f"state {state} has {len(losses)} steps already, steps is {steps}; ask for as many or more")
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for done in range(len(losses), steps):
                names, left, right = _draw(samples, batch_size, random.Random(f"{seed}/{done}"))
                rows = embed(prefixed(left + right, instruction))
                loss = info_nce(rows[:batch_size], rows[batch_size:], names, temperature)
                optimizer.param_groups[0]["lr"] = lr * min(1.0, (done + 1) / warmup) if warmup else lr
                losses.append(_step(loss, optimizer, trained, done))
                if progress is not None:
                    progress(done + 1, steps, losses[-1])
                if file is not None and ((done + 1) % save_every == 0 or done + 1 == steps):
                    file.save(encoder, trained, optimizer, losses)
    finally:
        optimizer.zero_grad()
        encoder.train(was_training)
    return losses


def info_nce(left: torch.Tensor, right: torch.Tensor, tasks: Sequence[str], temperature: float) -> torch.Tensor:
    """The loss of `train_encoder` for n pairs (n, d), (n, d), whose tasks may repeat.

    >>> import torch
    >>> from lorakern.mixture.contrastive import info_nce
    >>> info_nce(torch.eye(2), torch.eye(2), ["a", "a"], 1.0).item()
    0.0
    """
    unit = torch.nn.functional.normalize
    logits = unit(left.float(), dim=1) @ unit(right.float(), dim=1).T / temperature
    same = torch.tensor([[a == b for b in tasks] for a in tasks], device=logits.device)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -math.inf)
    target = torch.arange(len(tasks), device=logits.device)
    entropy = torch.nn.functional.cross_entropy
    return (entropy(logits, target) + entropy(logits.T, target)) / 2


def retrieval_accuracy(
    retriever: LoraRetriever, queries: Mapping[str, Sequence[str]], *, ks: Sequence[int] = (1, 3)
) -> dict[int, float]:
    """How often a text's own adapter is among the k that are retrieved for it: top-k accuracy over all texts.

    Args:
        retriever: a `LoraRetriever`.
        queries: for each adapter by name, texts of its task that are none of its samples.
        ks: the k to report.

    Returns:
        k to a share from 0 to 1.

    Raises:
        LorakernError: for a name that is not in the retriever, no texts, and a k that is none.

    >>> import torch
    >>> from lorakern.mixture import LoraRetriever, retrieval_accuracy
    >>> retriever = LoraRetriever(lambda texts: torch.tensor([[len(text), 1.0] for text in texts]), instruction="")
    >>> retriever.add("short", ["a"])
    >>> retriever.add("long", ["a" * 9])
    >>> retrieval_accuracy(retriever, {"short": ["b"], "long": ["b" * 8, ""]}, ks=(1, 2))
    {1: 0.6666666666666666, 2: 1.0}
    """
    if not isinstance(queries, Mapping) or not queries:
        raise LorakernError(f"queries must map names of adapters to texts, got {show(queries)}")
    if isinstance(ks, (str, bytes)) or not isinstance(ks, Sequence) or not ks:
        raise LorakernError(f"ks must be a list of integers, got {show(ks)}")
    if missing := [name for name in queries if name not in retriever]:
        raise LorakernError(f"queries names {show(missing[0])}, which is not in the retriever; add it first")
    texts = [(name, text) for name, own in queries.items() for text in check_texts(own)]
    for k in ks:
        _check_numbers(k=k)
    found = retriever.retrieve([text for _, text in texts], k=max(ks))
    pairs = list(zip(texts, found, strict=True))
    return {k: sum(name in dict(row[:k]) for (name, _), row in pairs) / len(pairs) for k in ks}


def _check_numbers(**numbers: Any) -> None:
    least = {"batch_size": 2, "warmup": 0, "seed": -math.inf}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least.get(name, 1):
            at_least = "" if name == "seed" else f" of at least {least.get(name, 1)}"
            raise LorakernError(f"{name} must be an integer{at_least}, got {show(value)}")


def _checked_tasks(tasks: Any) -> dict[str, list[str]]:
    if not isinstance(tasks, Mapping) or len(tasks) < 2:
        raise LorakernError(f"tasks must map at least two names to texts, got {show(tasks)}")
    samples = {check_name(name, "tasks: a name"): check_texts(texts) for name, texts in tasks.items()}
    if few := [name for name, texts in samples.items() if len(set(texts)) < 2]:
        raise LorakernError(f"tasks: {show(few[0])} has fewer than two different texts; give more, or leave it out")
    return {name: list(dict.fromkeys(texts)) for name, texts in samples.items()}


def _trained(encoder: Any) -> dict[str, torch.nn.Parameter]:
    if not isinstance(encoder, torch.nn.Module):
        raise LorakernError(f"encoder must be a torch module, such as MiniLM, to be trained; got {show(encoder)}")
    trained = {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}
    if not trained:
        raise LorakernError("encoder has no parameter that requires gradients; call encoder.requires_grad_()")
    if other := [name for name, weight in trained.items() if weight.dtype != torch.float32]:
        raise LorakernError(
            f"encoder: {other[0]} is {trained[other[0]].dtype}; small steps would be rounded away, train in float32"
        )
    return trained


def _draw(samples: dict[str, list[str]], count: int, rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """`count` pairs of different texts; all tasks once, in a new order, before one comes again."""
    names: list[str] = []
    while len(names) < count:
        names += rng.sample(list(samples), len(samples))
    pairs = [rng.sample(samples[name], 2) for name in names[:count]]
    return names[:count], [x for x, _ in pairs], [y for _, y in pairs]


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, trained: Mapping, done: int) -> float:
    value = loss.item()
    if not loss.requires_grad:
        raise LorakernError("encoder: its embeddings do not depend on its parameters; it needs `embed`, with gradients")
    if math.isfinite(value):
        optimizer.zero_grad()
        loss.backward()
    gradients = [weight.grad for weight in trained.values() if weight.grad is not None]
    if not math.isfinite(value) or not all(gradient.isfinite().all() for gradient in gradients):
        raise LorakernError(
            f"encoder: the loss or its gradient is not finite at step {done + 1} (loss {value}); take a smaller lr"
        )
    optimizer.step()
    return value
