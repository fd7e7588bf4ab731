"""`solve` and its kin `regmean` and `objective`: what users call."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from lorakern.errors import LorakernError
from lorakern.merge._arguments import check_integer
from lorakern.merge.inputs import Factors
from lorakern.merge.iteris.arguments import OP, prepare
from lorakern.merge.iteris.solution import Solution
from lorakern.merge.iteris.state import State, StateFile
from lorakern.merge.iteris.sweeps import Progress


def solve(
    model: torch.nn.Module,
    adapters: Sequence[Factors],
    samples: Sequence[Any],
    *,
    iterations: int = 10,
    alpha: float = 1e-5,
    lambda_source: Literal["full", "delta"] | None = "full",
    target: Literal["delta", "full"] = "delta",
    ratio: float = 0.0,
    coefficients: Sequence[float] | None = None,
    tokenizer: Callable | None = None,
    batch_size: int = 8,
    max_length: int = 256,
    max_memory: int | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Solution:
    """IterIS: one update per layer that, in the merged model, does what each adapter does in its own, on its samples.

    ``W = argmin sum_i c_i lambda_i ||X_i W_i^T - X~_i W^T||_F^2`` for every layer, with a row of X_i per token that is
    the layer's input in the base model with adapter i, and a row of X~_i its input in the merged model, on the same
    samples of task i. Regularised, its solution is

    ``G_i = X~_i^T X~_i + alpha ||X~_i^T X~_i||_F I``, ``C_i = X_i^T X~_i + alpha ||X_i^T X~_i||_F I``,
    ``W = (sum_i c_i lambda_i W_i C_i) (sum_i c_i lambda_i G_i)^-1``, ``lambda_i = ||W_i||_F^2 / ||X_i W_i^T||_F^2``.

    In the first sweep X~ = X; each further one takes X~ from the model merged by the sweep before, in all layers at
    once. Where an adapter leaves a layer alone that another one targets, its W_i is zero and counts.

    Products are made in float32, added up and solved in float64. No features are kept but those of a batch and, until
    there are half as many rows as a layer has columns, those before it. Nothing is random. The model is unchanged
    afterwards, bit for bit, also after an error.

    Args:
        model: any module whose targeted layers are `torch.nn.Linear` or transformers' `Conv1D`, and run as often in
            every batch as in the first one.
        adapters: N `LoraAdapter`s, or mappings from module path to (A (r, d_in), B (d_out, r), scale).
        samples: N sources, each a list of strings or the path of a JSONL file of {"text"} or {"prompt", "answer"}
            (joined as they are), both with `tokenizer`; or an iterable, not an iterator, of batches: dicts of model
            inputs, whose attention_mask says what is padding, or tensors.
        iterations: how many sweeps; more than 1 runs the merged model too.
        alpha: the regulariser, relative to the norms; the paper takes 1e-4 or less. Without it, at 0, the update is
            zero in directions that no sample reaches; far below 1e-6 rounding decides what it is there.
        lambda_source: W_i in lambda_i: the "full" weight W0 + s_i B_i A_i, as in the authors' code; the "delta"
            s_i B_i A_i alone; None for lambda_i = 1.
        target: W_i: the "delta" s_i B_i A_i, or the "full" weight, of which the update is what goes beyond W0.
        ratio: rho in [0, 1): X~ is replaced by ``(1 - rho) X~ + rho X``.
        coefficients: c_i, N numbers of at least 0; None for 1 each.
        tokenizer: called as tokenizer(texts, truncation=True, max_length=...) for "input_ids".
        batch_size: texts in a batch.
        max_length: tokens of a text at most.
        max_memory: bytes of sums that are kept at once. Layers are taken in groups that fit, with a pass over the
            samples for each; the result is the same. Beside them there are the targeted weights once more, as
            merged, and one set of updates.
        state: a folder that keeps the last whole sweep; a call with the same arguments (`iterations`, `max_memory`
            and `batch_size` of given batches aside) goes on from there, to the same bits.
        progress: called as progress(done, total, what) before each pass over the samples of one task.

    Returns:
        `Solution`. Its objectives take a last pass over the samples.

    Raises:
        LorakernError: adapters that do not fit the model, no samples or not as many sources as adapters, a value out
            of range, a layer that does not run or is not reached, features that are not finite, more memory needed than
            `max_memory`, or a state of other arguments. What `state` holds is then still the last good sweep.

    IterIS: arXiv 2411.15231, from the formulas; iterations, max_length and lambda_source are those of the
    authors' GLUE configuration.

    >>> import torch
    >>> from lorakern.merge import iteris
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> tasks = [{"0": (torch.randn(2, 4), torch.randn(4, 2), 0.5), "2": (torch.randn(1, 4), torch.randn(2, 1), 1.0)}
    ...          for _ in range(2)]
    >>> merged = iteris.solve(model, tasks, [[torch.randn(32, 4)], [torch.randn(32, 4)]], iterations=3)
    >>> {module: tuple(update.shape) for module, update in merged.updates.items()}, len(merged.objectives)
    ({'0': (4, 4), '2': (2, 4)}, 3)
    >>> merged = iteris.solve(model, tasks[:1], [[torch.randn(32, 4)]], iterations=2)
    >>> torch.allclose(merged.updates["0"], 0.5 * tasks[0]["0"][1] @ tasks[0]["0"][0], atol=1e-4)
    True
    """
    check_integer(OP, "iterations", iterations)
    sweeps = prepare(
        model,
        adapters,
        samples,
        alpha=alpha,
        lambda_source=lambda_source,
        target=target,
        ratio=ratio,
        coefficients=coefficients,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        max_memory=max_memory,
        progress=progress,
    )
    file = None if state is None else StateFile(state, sweeps.arguments())
    reached = State() if file is None else file.load()
    if reached.sweeps > iterations:
        raise LorakernError(
            f"{OP}: {state} has {reached.sweeps} sweeps already, iterations is {iterations}; ask for as many, or give "
            "another state folder"
        )
    reached = sweeps.run(reached, iterations, None if file is None else file.save)
    fields = reached.updates, reached.objectives, reached.lambdas, reached.undetermined
    return Solution(*fields, fan_in_fan_out=sweeps.transposed)


def objective(
    model: torch.nn.Module,
    adapters: Sequence[Factors],
    samples: Sequence[Any],
    merged: Mapping[str, Any],
    *,
    lambda_source: Literal["full", "delta"] | None = "full",
    target: Literal["delta", "full"] = "delta",
    coefficients: Sequence[float] | None = None,
    tokenizer: Callable | None = None,
    batch_size: int = 8,
    max_length: int = 256,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What `solve` minimises, for a merge made by any method: ``sum_i c_i lambda_i ||X_i W_i^T - X~_i W^T||_F^2``.

    X~ are the features in the merged model itself, as in `Solution.objectives`.

    Args:
        model: as in `solve`.
        adapters: as in `solve`.
        samples: as in `solve`.
        merged: module path to what is added to its weight: a dense update (d_out, d_in) or (A, B, scale); a
            `LoraAdapter` or `Solution.updates`. Modules that it lacks are zero.
        lambda_source: as in `solve`, and all further arguments.

    Returns:
        Module path to its objective.

    Raises:
        LorakernError: as `solve`, and for a module of `merged` that no adapter targets, or of another shape.

    IterIS: arXiv 2411.15231.

    >>> import torch, lorakern as lk
    >>> from lorakern.merge import iteris
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> tasks = [{"0": (torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), 1.0)},
    ...          {"0": (torch.tensor([[0.0, 1.0]]), torch.ones(1, 1), 1.0)}]
    >>> x = [[torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 2.0]])]]
    >>> mean = lk.merge(tasks, weights=[0.5, 0.5])
    >>> iteris.objective(model, tasks, x, mean, lambda_source=None)  # of 1 and of 2 a half is missing
    {'0': 1.25}
    """
    sweeps = prepare(
        model,
        adapters,
        samples,
        alpha=0.0,
        lambda_source=lambda_source,
        target=target,
        ratio=0.0,
        coefficients=coefficients,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        max_memory=max_memory,
        progress=progress,
    )
    return sweeps.objective(merged)


def regmean(
    model: torch.nn.Module, adapters: Sequence[Factors], samples: Sequence[Any], *, alpha: float = 0.0, **options: Any
) -> Solution:
    """RegMean of the updates, one sweep with lambda = 1: ``W = (sum_i W_i X_i^T X_i) (sum_i X_i^T X_i)^-1``.

    Args:
        model: as in `solve`.
        adapters: as in `solve`.
        samples: as in `solve`.
        alpha: the regulariser of `solve`.
        options: those of `solve`, but for iterations and lambda_source.

    Returns:
        `Solution`. Its objective is that of the merged model in its own features.

    Raises:
        LorakernError: as `solve`.

    RegMean: arXiv 2212.09849, without its shrinking of what is off the diagonals.

    >>> import torch
    >>> from lorakern.merge import iteris
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> tasks = [{"0": (torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), 1.0)},
    ...          {"0": (torch.tensor([[0.0, 1.0]]), torch.ones(1, 1), 1.0)}]
    >>> x = [[torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]]  # each has seen what the other has not
    >>> iteris.regmean(model, tasks, x).updates["0"].round(decimals=4).tolist()
    [[1.0, 1.0]]
    """
    if taken := {"iterations", "lambda_source"} & set(options):
        raise LorakernError(f"{OP}: regmean has one sweep and lambda = 1 and takes no {min(taken)}; use solve for that")
    return solve(model, adapters, samples, iterations=1, alpha=alpha, lambda_source=None, **options)
