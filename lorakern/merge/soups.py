"""LoRA Soups (CAT): one weight per adapter and module, learned with everything else frozen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakern.adapters import LoraAdapter
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.integrations.gated import GatedModel
from lorakern.merge._arguments import check_choice, check_integer, check_number
from lorakern.merge._batches import Batches
from lorakern.merge.driver import merge, module_generator
from lorakern.merge.inputs import Factors, checked_adapters, shared_config

PARAMETRISATIONS = ("softmax", "free")
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Soup:
    """Adapters and the weights that were learned for them.

    Attributes:
        weights: module path to (N,) float32, in the order of the adapters; 0 for an adapter that lacks the module.
        losses: the loss of every step, before the step was taken.

    >>> import torch
    >>> from lorakern.merge.soups import Soup
    >>> a = {"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> soup = Soup([a, a], {"proj": torch.tensor([0.25, 0.5])}, (), None)
    >>> soup.merged["proj"].rank, soup.adapter(rank=1)["proj"].rank
    (4, 1)
    """

    adapters: Sequence[Factors] = field(repr=False)
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    base_model_name_or_path: str | None

    @property
    def merged(self) -> LoraAdapter:
        """`adapter` as it is, at the sum of the ranks."""
        return self.adapter()

    def adapter(self, rank: int | float | None = None, *, dtype: torch.dtype | None = None) -> LoraAdapter:
        """The weighted sum of the adapters as one: exact at the sum of their ranks, or the best one of a lower rank.

        ``sum_i w_i s_i B_i A_i`` for each module, by `lorakern.merge` with method "cat", or "svd" for a rank.

        Args:
            rank: None, the rank at most, or a share of the energy in (0, 1).
            dtype: of the factors; None for what the adapters' own promote to.

        Raises:
            LorakernError: as `lorakern.merge`.
        """
        return merge(
            self.adapters,
            "cat" if rank is None else "svd",
            rank=rank,
            dtype=dtype,
            per_module=lambda module: {"weights": self.weights[module].tolist()},
            base_model_name_or_path=self.base_model_name_or_path,
        )


def learn(
    model: torch.nn.Module,
    adapters: Sequence[Factors],
    data: Any,
    *,
    tokenizer: Callable | None = None,
    parametrisation: str = "softmax",
    init: str | int | Sequence[float] = "zero",
    lr: float = 1e-4,
    epochs: int = 1,
    batch_size: int = 6,
    warmup: int = 100,
    cutoff: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    base_model_name_or_path: str | None = None,
) -> Soup:
    """Learn a weight for each adapter in each module, with the model and all A and B frozen: CAT of LoRA Soups.

    ``y = W x + sum_i w_i s_i B_i (A_i x)`` in every module, with ``w = softmax(theta)`` over the adapters that have the
    module, or ``w = theta``, and theta learned by AdamW on the model's own loss. All adapters of a layer run as one
    gated shrink and expand; nothing is concatenated until the result is asked for. The learning rate rises linearly
    over the warm-up and falls linearly to 0 at the end; the defaults are the paper's budget. Dropout is off.

    Args:
        model: a causal language model of transformers, or any module that, called with input_ids, attention_mask,
            labels and use_cache, returns an object with a `loss`. On return, and on any error, it is what it was.
        adapters: N `LoraAdapter`s, or mappings from module path to (A (r, d_in), B (d_out, r), scale). They run in
            the dtype of the model's layers.
        data: a list of texts, of records {"text"} or {"prompt", "answer"} (the loss is on the answer alone, an
            end-of-text token is added), the path of a JSONL file of such records, or an iterable of tokenised batches:
            mappings with input_ids (rows, length), and attention_mask and labels if need be. Texts are taken as they
            are: chat templates are the caller's.
        tokenizer: of the model; needed for texts and records.
        parametrisation: "softmax", weights that are positive and sum to 1, or "free". Softmax cannot give the plain
            sum of the adapters; nearly orthogonal adapters do better with free weights.
        init: theta at the start: "zero" (softmax: the mean of the adapters; free: the base model), an integer for
            N(0, 1) drawn from that seed, as the paper has it, or a number for each adapter.
        lr: the highest learning rate.
        epochs: passes over the data.
        batch_size: examples a step; tokenised batches keep theirs.
        warmup: steps over which the learning rate rises; with fewer steps in all it does not reach `lr`.
        cutoff: the most tokens of a sequence; what is beyond is cut off.
        seed: of the order of the examples, which is new in every epoch. Tokenised batches keep their order.
        progress: called as progress(done, total, loss) after each step.
        base_model_name_or_path: to be written to the result's config; needed if the adapters name different ones.

    Returns:
        A `Soup`: `weights`, `losses`, and the merged adapter.

    Raises:
        LorakernError: for arguments of another form, adapters that do not fit the model, and empty data, before
            anything is computed; and for a loss or gradient that is not finite: the error's attribute `soup` is then
            the `Soup` of the last weights whose loss was finite.

    LoRA Soups: arXiv 2410.13025.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from lorakern.merge import soups
    >>> class Echo(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.proj = torch.nn.Linear(4, 4, bias=False)
    ...     def forward(self, input_ids, attention_mask, labels, use_cache):
    ...         logits = self.proj(torch.eye(4)[input_ids])
    ...         return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))
    >>> same, other = ({"proj": (torch.eye(4), torch.eye(4).roll(k, 0), 5.0)} for k in (0, 1))
    >>> data = [{"input_ids": torch.tensor([[1, 1, 1, 1]])}]
    >>> soup = soups.learn(Echo(), [same, other], data, lr=0.5, epochs=20, warmup=1)
    >>> soup.weights["proj"][0].item() > 0.9, soup.losses[-1] < soup.losses[0], soup.merged["proj"].rank
    (True, True, 8)
    """
    op = "learn"
    check_choice(op, "parametrisation", parametrisation, PARAMETRISATIONS)
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 1),
        ("warmup", warmup, 0),
        ("cutoff", cutoff, 2),
        ("seed", seed, None),
    ):
        check_integer(op, name, value, least)
    check_number(op, "lr", lr)
    adapters = checked_adapters(adapters)
    shared_config(adapters, base_model_name_or_path)
    batches = Batches(op, data, tokenizer, batch_size, cutoff)
    with torch.inference_mode(False), torch.enable_grad():
        gated = GatedModel(op, model, adapters)
        start = _start(op, init, gated.modules, len(adapters)).to(gated.held.device)
        run = _Run(gated, adapters, start, parametrisation == "softmax", base_model_name_or_path)
        with gated:
            run.train(batches, lr, epochs, warmup, seed, progress)
    return run.soup(run.theta)


class _Run:
    """theta (M, N), the losses so far, and how both become a `Soup`."""

    def __init__(
        self, gated: GatedModel, adapters: list[Factors], start: torch.Tensor, softmax: bool, base: str | None
    ) -> None:
        self.gated, self.adapters, self.softmax, self.base = gated, adapters, softmax, base
        self.theta = start.requires_grad_()
        self.losses: list[float] = []

    def weights(self, theta: torch.Tensor) -> torch.Tensor:
        """(M, N), 0 where an adapter lacks a module."""
        if self.softmax:
            return theta.masked_fill(~self.gated.held, -torch.inf).softmax(1)
        return theta.masked_fill(~self.gated.held, 0.0)

    def soup(self, theta: torch.Tensor) -> Soup:
        weights = dict(zip(self.gated.modules, self.weights(theta.detach()).cpu(), strict=True))
        return Soup(self.adapters, weights, tuple(self.losses), self.base)

    def train(
        self, batches: Batches, lr: float, epochs: int, warmup: int, seed: int, progress: Progress | None
    ) -> None:
        total = epochs * len(batches)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW([self.theta], lr=lr, weight_decay=0.0)
        good = self.theta.detach().clone()
        for _ in range(epochs):
            for batch in batches.epoch(generator):
                done = len(self.losses)
                optimizer.param_groups[0]["lr"] = lr * _share_of_rate(done, total, warmup)
                optimizer.zero_grad()
                self.gated.gates = self.weights(self.theta)
                loss = loss_of(self.gated.model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise self._not_finite("loss", value, good, total)
                if not loss.requires_grad:
                    raise LorakernError(
                        "learn: the loss does not depend on any targeted layer; give the model that runs the layers "
                        "of the adapters, with gradients"
                    )
                good = self.theta.detach().clone()
                loss.backward()
                if not self.theta.grad.isfinite().all():
                    raise self._not_finite("gradient", value, good, total)
                optimizer.step()
                self.losses.append(value)
                if progress is not None:
                    progress(done + 1, total, value)

    def _not_finite(self, what: str, loss: float, good: torch.Tensor, total: int) -> LorakernError:
        error = LorakernError(
            f"learn: the {what} is not finite at step {len(self.losses) + 1} of {total} (the loss is {loss}); the last "
            "weights of a finite loss are in this error's attribute `soup`. Take a smaller lr, or a model in float32"
        )
        error.soup = self.soup(good)
        return error


def _share_of_rate(done: int, total: int, warmup: int) -> float:
    """A linear rise over the warm-up, then a linear fall to 0 at the end."""
    return (done + 1) / warmup if done < warmup else (total - done) / (total - warmup)


def loss_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss of a batch; raises for a model that has none."""
    device = next(model.parameters()).device
    loss = getattr(model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False), "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise LorakernError(
            f"model must return an object with a loss when it is given labels, got {show(loss)} from "
            f"{type(model).__name__}; load it by transformers' AutoModelForCausalLM"
        )
    return loss


def _start(op: str, init: Any, modules: list[str], count: int) -> torch.Tensor:
    """theta (M, N) float32; a module's random numbers depend on its name and the seed alone."""
    if init == "zero" and isinstance(init, str):
        return torch.zeros(len(modules), count)
    if isinstance(init, int) and not isinstance(init, bool):
        return torch.stack([torch.randn(count, generator=module_generator(init, module)) for module in modules])
    try:
        numbers = torch.tensor(init, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0)
    if isinstance(init, (str, bool)) or numbers.shape != (count,) or not numbers.isfinite().all():
        takes = f"'zero', an integer as a seed, or a list of {count} numbers, one for each adapter"
        raise LorakernError(f"{op}: init must be {takes}, got {show(init)}")
    return numbers.repeat(len(modules), 1)
