"""LoraHub: one weight per adapter, found without gradients from a few examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from lorakern.adapters import LoraAdapter
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.integrations.gated import GatedModel
from lorakern.merge._arguments import check_choice, check_integer, check_number
from lorakern.merge._batches import IGNORED, Batch, Batches
from lorakern.merge.driver import merge
from lorakern.merge.inputs import Factors, checked_adapters, shared_config
from lorakern.merge.soups import Progress, loss_of

COMBINATIONS = ("lorahub_linear", "cat")
# Tokens of several candidates at once: what their logits need is some hundred MB.
TOKENS = 2048
# Candidates of a generation.
OFFSPRING = 8


class Objective(Protocol):
    """What is to be minimised: N weights to a float, infinity where the loss is not finite.

    `many` gives the same for several candidates in one go, which takes less time than one after the other.
    """

    def __call__(self, weights: Sequence[float]) -> float: ...
    def many(self, candidates: Sequence[Sequence[float]]) -> list[float]: ...


class Optimizer(Protocol):
    """What searches for the weights: a function that asks `objective` for at most `budget` candidates.

    Args:
        objective: an `Objective`.
        start: N numbers, where to begin.
        bound: the weights lie in [-bound, bound].
        budget: the most calls of the objective.
        seed: of everything random.

    Returns:
        N numbers, the weights to take.
    """

    def __call__(
        self, objective: Objective, start: Sequence[float], *, bound: float, budget: int, seed: int
    ) -> Sequence[float]: ...


@dataclass(frozen=True)
class Hub:
    """Adapters and the weights that were found for them.

    Attributes:
        weights: N floats, in the order of the adapters.
        score: the objective there, the mean loss with the L1 term.
        trace: (weights, score) of every candidate, in the order in which they were tried.
        combine: how the weights apply, see `search`.

    >>> import torch
    >>> from lorakern.merge.lorahub import Hub
    >>> a = {"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> Hub([a, a], (0.5, 1.0), 2.0, (), "cat", None).adapter()["proj"].rank
    4
    """

    adapters: Sequence[Factors] = field(repr=False)
    weights: tuple[float, ...]
    score: float
    trace: tuple[tuple[tuple[float, ...], float], ...] = field(repr=False)
    combine: str
    base_model_name_or_path: str | None

    def adapter(self, rank: int | None = None, *, dtype: torch.dtype | None = None) -> LoraAdapter:
        """The adapters as one, by `lorakern.merge`, truncated to a rank where one is given; raises as that does."""
        method = "svd" if self.combine == "cat" and rank is not None else self.combine
        base = self.base_model_name_or_path
        return merge(
            self.adapters, method, weights=list(self.weights), rank=rank, dtype=dtype, base_model_name_or_path=base
        )


def search(
    model: torch.nn.Module,
    adapters: Sequence[Factors],
    data: Any,
    *,
    tokenizer: Callable | None = None,
    combine: str = "lorahub_linear",
    optimizer: Optimizer | None = None,
    budget: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    batch_size: int = 6,
    cutoff: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    base_model_name_or_path: str | None = None,
) -> Hub:
    """Search for one weight per adapter that minimises the loss on a few examples: LoraHub.

    The objective is ``loss + l1 * mean_i |w_i|`` over w in [-bound, bound]^N, from w = 0, with the mean loss of all
    tokens that count. A candidate is scored through gated adapters, without gradients: no adapter is rebuilt.

    Args:
        model, adapters, data, tokenizer, batch_size, cutoff, base_model_name_or_path: as in
            `lorakern.merge.soups.learn`; the published setting is five examples.
        combine: "lorahub_linear", the published ``(sum_i w_i s_i B_i) (sum_i w_i A_i)``, which has cross terms, or
            "cat", ``sum_i w_i s_i B_i A_i``.
        optimizer: an `Optimizer`: `evolution`, the default, which scores eight candidates at once, `one_plus_one`, or
            `nevergrad`, which LoraHub takes.
        budget: candidates to score.
        bound: the largest magnitude of a weight.
        l1: the factor of the L1 term.
        seed: given to the optimizer.
        progress: called as progress(done, budget, score) after each candidate.

    Returns:
        A `Hub`: `weights`, `score`, `trace`, and the merged adapter.

    Raises:
        LorakernError: as `lorakern.merge.soups.learn`; for an optimizer that exceeds the budget or returns no N numbers
            within the bound; and where no candidate had a finite loss.

    LoraHub: arXiv 2307.13269.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from lorakern.merge import lorahub
    >>> class Echo(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.proj = torch.nn.Linear(4, 4, bias=False)
    ...     def forward(self, input_ids, attention_mask, labels, use_cache):
    ...         logits = self.proj(torch.eye(4)[input_ids])
    ...         return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))
    >>> same, other = ({"proj": (torch.eye(4), torch.eye(4).roll(k, 0), 5.0)} for k in (0, 1))
    >>> hub = lorahub.search(Echo(), [same, other], [{"input_ids": torch.tensor([[1, 1, 1, 1]])}])
    >>> hub.score < 0.2, abs(hub.weights[0]) > abs(hub.weights[1]), len(hub.trace), hub.adapter()["proj"].rank
    (True, True, 40, 4)
    """
    op = "lorahub"
    check_choice(op, "combine", combine, COMBINATIONS)
    for name, value, least in (("budget", budget, 1), ("batch_size", batch_size, 1), ("cutoff", cutoff, 2)):
        check_integer(op, name, value, least)
    check_integer(op, "seed", seed, None)
    check_number(op, "bound", bound)
    check_number(op, "l1", l1, zero=True)
    optimizer = evolution if optimizer is None else optimizer
    if not callable(optimizer):
        raise LorakernError(f"{op}: optimizer must be a function, such as evolution, got {show(optimizer)}")
    adapters = checked_adapters(adapters)
    shared_config(adapters, base_model_name_or_path)
    batches = list(Batches(op, data, tokenizer, batch_size, cutoff).epoch())
    with torch.inference_mode(False), torch.no_grad():
        gated = GatedModel(op, model, adapters)
        gated.crossed = combine == "lorahub_linear"
        scores = _Scores(gated, batches, l1, budget, progress)
        with gated:
            found = optimizer(scores, [0.0] * len(adapters), bound=bound, budget=budget, seed=seed)
    weights = _vector(f"{op}: the optimizer's result", found, len(adapters))
    if max(map(abs, weights)) > bound * (1 + 1e-9):
        raise LorakernError(f"{op}: the optimizer's result {show(weights)} is outside of the bound {bound}; mend it")
    score = next((score for tried, score in scores.trace if tried == weights), None)
    if score is None:
        raise LorakernError(f"{op}: the optimizer's result {show(weights)} is none of its candidates; mend it")
    if not math.isfinite(score):
        raise LorakernError(
            f"{op}: the loss is not finite at the best of {len(scores.trace)} candidates; load the model in float32, "
            "or look at the data"
        )
    return Hub(adapters, weights, score, tuple(scores.trace), combine, base_model_name_or_path)


class _Scores:
    """The objective, and the trace of what it was asked."""

    def __init__(self, gated: GatedModel, batches: list, l1: float, budget: int, progress: Progress | None) -> None:
        self.gated, self.batches, self.l1, self.budget, self.progress = gated, batches, l1, budget, progress
        # of other losses only the model itself knows what they are
        self.causal = getattr(getattr(gated.model, "loss_function", None), "__name__", None) == "ForCausalLMLoss"
        self.counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        self.trace: list[tuple[tuple[float, ...], float]] = []

    def __call__(self, weights: Sequence[float]) -> float:
        return self.many([weights])[0]

    def many(self, candidates: Sequence[Sequence[float]]) -> list[float]:
        if len(self.trace) + len(candidates) > self.budget:
            raise LorakernError(f"lorahub: the optimizer asks for more than the budget of {self.budget}; mend it")
        count = self.gated.held.shape[1]
        vectors = [_vector("lorahub: a candidate of the optimizer", weights, count) for weights in candidates]
        means = [0.0] * len(vectors)
        for batch, tokens in zip(self.batches, self.counts, strict=True):
            at_once = max(1, TOKENS // batch["input_ids"].numel()) if self.causal else 1
            for first in range(0, len(vectors), at_once):
                for i, loss in enumerate(self._losses(batch, vectors[first : first + at_once]), first):
                    means[i] += loss * tokens / sum(self.counts)
        for weights, mean in zip(vectors, means, strict=True):
            score = mean + self.l1 * sum(map(abs, weights)) / count
            self.trace.append((weights, score if math.isfinite(score) else math.inf))
            if self.progress is not None:
                self.progress(len(self.trace), self.budget, self.trace[-1][1])
        return [score for _, score in self.trace[-len(vectors) :]]

    def _losses(self, batch: Batch, vectors: Sequence[Sequence[float]]) -> list[float]:
        """The loss of a batch with each of the weights; more than one are parts of one batch."""
        held = self.gated.held
        gates = torch.tensor(vectors, device=held.device)[:, None].expand(-1, *held.shape)
        if len(vectors) == 1:
            self.gated.gates = gates[0]
            return [loss_of(self.gated.model, batch).item()]
        self.gated.gates = gates
        ids, mask = (batch[name].to(held.device).repeat(len(vectors), 1) for name in ("input_ids", "attention_mask"))
        logits = self.gated.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        labels = batch["labels"].to(held.device)[:, 1:]
        sums = []
        # row by row, whose logits in float32 stay in the cache
        for part in logits[:, :-1].unflatten(0, (len(vectors), -1)):
            rows = zip(part, labels, strict=True)
            sums.append(sum(cross_entropy(r.float(), y, ignore_index=IGNORED, reduction="sum").item() for r, y in rows))
        return [total / int((labels != IGNORED).sum()) for total in sums]


def _vector(where: str, weights: Any, count: int) -> tuple[float, ...]:
    try:
        vector = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        vector = ()
    if len(vector) != count or not all(map(math.isfinite, vector)):
        raise LorakernError(f"{where} must be {count} finite numbers, one for each adapter, got {show(weights)}")
    return vector


def evolution(objective: Objective, start: Sequence[float], *, bound: float, budget: int, seed: int) -> Sequence[float]:
    """The (1+8) evolution strategy: eight normal steps from the best, the best of them kept if it is better still.

    The step's size begins at a third of the bound; it grows by 1.5 after a generation that was a success, and shrinks
    by 1.5 after one that was not. A generation is scored in one go. Arguments and result: see `Optimizer`.

    >>> from types import SimpleNamespace
    >>> from lorakern.merge.lorahub import evolution
    >>> bowl = SimpleNamespace(many=lambda tried: [(w[0] - 1) ** 2 + w[1] ** 2 for w in tried])
    >>> [round(w, 1) + 0.0 for w in evolution(bowl, [0.0, 0.0], bound=1.5, budget=100, seed=0)]
    [1.0, 0.0]
    """
    generator = torch.Generator().manual_seed(seed)
    best, least, step = torch.tensor(start, dtype=torch.float64), math.inf, bound / 3
    left = budget
    while left:
        noise = torch.randn(min(OFFSPRING, left), len(best), generator=generator, dtype=torch.float64)
        if left == budget:
            # the first generation holds the start itself
            noise[0] = 0.0
        tried = (best + step * noise).clamp(-bound, bound)
        scores = objective.many(tried.tolist())
        found = min(range(len(scores)), key=scores.__getitem__)
        if scores[found] < least:
            best, least, step = tried[found], scores[found], step * 1.5
        else:
            step /= 1.5
        left -= len(scores)
    return best.tolist()


def one_plus_one(
    objective: Objective, start: Sequence[float], *, bound: float, budget: int, seed: int
) -> Sequence[float]:
    """The (1+1) evolution strategy with the one-fifth success rule: a normal step from the best, kept if it is better.

    The step's size begins at a third of the bound; it grows by 1.5 after a success and shrinks by 1.5^(1/4) after a
    failure, so that it stays where one step in five succeeds. Arguments and result: see `Optimizer`. Rechenberg, 1973.

    >>> from lorakern.merge.lorahub import one_plus_one
    >>> found = one_plus_one(lambda w: (w[0] - 1) ** 2 + w[1] ** 2, [0.0, 0.0], bound=1.5, budget=100, seed=0)
    >>> [round(w, 1) + 0.0 for w in found]
    [1.0, 0.0]
    """
    generator = torch.Generator().manual_seed(seed)
    best = torch.tensor(start, dtype=torch.float64)
    least, step = objective(best.tolist()), bound / 3
    for _ in range(budget - 1):
        noise = torch.randn(len(best), generator=generator, dtype=torch.float64)
        tried = (best + step * noise).clamp(-bound, bound)
        score = objective(tried.tolist())
        if score < least:
            best, least, step = tried, score, step * 1.5
        else:
            step /= 1.5**0.25
    return best.tolist()


def nevergrad(objective: Objective, start: Sequence[float], *, bound: float, budget: int, seed: int) -> Sequence[float]:
    """The optimizer that LoraHub takes, nevergrad's NGOpt; of the candidates it tried, the best.

    Arguments and result: see `Optimizer`. Raises `LorakernError` where nevergrad is missing.

    >>> import torch
    >>> from lorakern.merge import lorahub
    >>> hub = lorahub.search(model, adapters, data, optimizer=lorahub.nevergrad)  # doctest: +SKIP
    """
    try:
        from nevergrad import optimizers, p
    except ImportError as error:
        raise LorakernError(
            f"lorahub: cannot import {error.name!r}; run `pip install nevergrad`, or take optimizer=evolution"
        ) from None
    count, tried = len(start), []

    def recorded(weights):
        tried.append((objective(weights.tolist()), weights.tolist()))
        return tried[-1][0]

    space = p.Array(init=list(start), lower=[-bound] * count, upper=[bound] * count)
    space.random_state.seed(seed)
    optimizers.registry["NGOpt"](parametrization=space, budget=budget).minimize(recorded)
    return min(tried)[1]
