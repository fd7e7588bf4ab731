"""`merge` and `merge_modules`: check the arguments, hand each module's terms to the method, check what comes back."""

import hashlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from lorakern.adapters import LoraAdapter, LoraFactors
from lorakern.adapters.factors import DTYPES, all_finite, check_name, checked
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.merge.inputs import Factors, Inputs, check_adapters, shared_config
from lorakern.merge.options import check_options
from lorakern.merge.registry import Method, Term, find

Rank = int | float | None
PerModule = Callable[[str], Mapping[str, Any]]
Progress = Callable[[int, int, str], None]


def merge(
    adapters: Sequence[Factors],
    method: str = "cat",
    *,
    weights: Sequence[float] | None = None,
    rank: Rank | Mapping[str, Rank] = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    normalize: bool = False,
    missing: str = "zero",
    device: torch.device | str | None = None,
    per_module: PerModule | None = None,
    progress: Progress | None = None,
    base_model_name_or_path: str | None = None,
    **options: Any,
) -> LoraAdapter:
    """Merge LoRA adapters into one, from the factors alone: ``D = f(w_1, D_1, .., w_N, D_N)``, ``D_i = s_i B_i A_i``.

    Every method takes adapters of different ranks, scales (alphas, rsLoRA), dtypes and modules. It works in float32
    at least and on one module, or a batch of them, after the other.

    Args:
        adapters: `LoraAdapter`s, or any mappings from module path to (A (r, d_in), B (d_out, r), scale).
        method: f, one of `lorakern.merge.methods`: cat, linear, svd, ties, dare_linear, dare_ties, magnitude_prune,
            knots, lego, fedex, peft_linear, peft_ties, peft_dare_linear, peft_dare_ties, peft_magnitude_prune,
            lorahub_linear, or one that was added with `lorakern.merge.method`.
        weights: a number for each adapter, negative ones too; None for 1 each: the sum of the adapters, not the mean.
        rank: the rank of the result at most; a number in (0, 1) for that share of the energy (squared singular values)
            in methods that know it; None for what the method says; or a mapping from module path to one of these,
            None for modules that it leaves out.
        dtype: of the result; None for the dtype to which a module's factors promote.
        seed: of everything random. A module's random numbers depend on its name and on this alone.
        normalize: divide the weights by their sum.
        missing: what an adapter is that lacks a module which others have: "zero", an update of zeros; "skip", the
            same, but not counted when weights are normalized; or an "error".
        device: where to compute; None for where the factors are. The result is where the first adapter's factors are.
        per_module: module path -> arguments that differ for that module: weights, rank and the method's own options.
        progress: called as progress(done, total, module) after each module.
        base_model_name_or_path: to be written to the config; needed if the adapters name different ones.
        options: the method's own, listed in its docstring and in ``lorakern.merge.methods[method].options``.

    Returns:
        A `LoraAdapter` of all modules that any adapter has. A factor whose update came out as zero has rank 1.

    Raises:
        LorakernError: for arguments of another form, an option that the method does not have, shapes that differ
            between adapters, NaN or infinity in the factors or the result, and adapters for different base models or
            layouts (fan_in_fan_out). The message names the module and the adapter.

    >>> import torch, lorakern as lk
    >>> a = {"q_proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> b = {"q_proj": (torch.ones(4, 8), torch.ones(6, 4), 0.25), "v_proj": (torch.ones(4, 8), torch.ones(6, 4), 1.0)}
    >>> merged = lk.merge([a, b], method="svd", weights=[0.5, 2.0], rank=1)
    >>> {module: round((scale * B @ A)[0, 0].item(), 4) for module, (A, B, scale) in merged.items()}
    {'q_proj': 2.5, 'v_proj': 8.0}
    """
    check_adapters(adapters)
    config = shared_config(adapters, base_model_name_or_path)
    modules = merge_modules(
        adapters,
        method,
        weights=weights,
        rank=rank,
        dtype=dtype,
        seed=seed,
        normalize=normalize,
        missing=missing,
        device=device,
        per_module=per_module,
        progress=progress,
        **options,
    )
    return LoraAdapter(dict(modules), **config)


def merge_modules(
    adapters: Sequence[Factors],
    method: str = "cat",
    *,
    weights: Sequence[float] | None = None,
    rank: Rank | Mapping[str, Rank] = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    normalize: bool = False,
    missing: str = "zero",
    device: torch.device | str | None = None,
    per_module: PerModule | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[tuple[str, LoraFactors]]:
    """The modules of `merge`, one after the other: yields ``(module, LoraFactors)``, computed when it is asked for.

    Factors are looked up module by module, so with adapters that read on demand the memory needed is that of a few
    modules. Arguments and errors are those of `merge`; arguments are checked at once, factors when their turn comes.

    >>> import torch
    >>> from lorakern.merge import merge_modules
    >>> a = {"q_proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> [(module, factors.rank) for module, factors in merge_modules([a, a], "cat")]
    [('q_proj', 4)]
    """
    check_adapters(adapters)
    found = find(method)
    if dtype is not None and dtype not in DTYPES:
        raise LorakernError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {show(dtype)}")
    inputs = Inputs(adapters, normalize=normalize, missing=missing, device=device)
    arguments = {"weights": weights, "rank": rank, **options}
    modules, merged = run_method(found, inputs, adapters, arguments, seed, per_module)
    return _results(found, inputs, modules, merged, dtype, progress)


def run_method(
    found: Method,
    inputs: Inputs,
    adapters: Sequence[Factors],
    arguments: Mapping[str, Any],
    seed: int = 0,
    per_module: PerModule | None = None,
) -> tuple[list[str], Iterator[tuple[str, Any]]]:
    """All modules, and what the method makes of each when asked for it; `arguments` are weights, rank and its options.

    Raises `LorakernError` at once for bad arguments.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise LorakernError(f"seed must be an integer, got {show(seed)}")
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter))
    rank = arguments["rank"]
    if isinstance(rank, Mapping):
        if unknown := [module for module in rank if module not in modules]:
            raise LorakernError(f"rank must be of modules that the adapters have, got {show(unknown[0])}")
        arguments, per_module = {**arguments, "rank": None}, _with_ranks(rank, per_module)
    check_arguments(found, arguments, len(adapters))
    if not modules:
        raise LorakernError("adapters hold no module; there is nothing to merge")
    for module in modules:
        check_name(module)
    given = partial(_given, found, inputs, arguments, per_module, len(adapters))
    return modules, (_whole if found.whole else _each)(found, inputs, modules, given, seed)


def module_generator(seed: int, module: str) -> torch.Generator:
    """The generator that a method is given for a module: its state depends on nothing but the seed and the name.

    >>> from lorakern.merge import module_generator
    >>> module_generator(0, "q_proj").initial_seed() == module_generator(1, "q_proj").initial_seed()
    False
    """
    digest = hashlib.blake2b(f"{seed}/{module}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _with_ranks(ranks: Mapping[str, Rank], per_module: PerModule | None) -> PerModule:
    """`per_module` with a rank for each module."""
    return lambda module: {"rank": ranks.get(module), **(per_module(module) if per_module else {})}


def _given(
    found: Method,
    inputs: Inputs,
    arguments: Mapping[str, Any],
    per_module: PerModule | None,
    count: int,
    module: str,
) -> tuple[Any, Rank, dict[str, Any]]:
    """The weights, the rank and the options for a module."""
    options = dict(arguments)
    if per_module is not None:
        with _naming(module):
            options |= per_module(module)
            check_arguments(found, options, count)
    for name in options.keys() & found.per_adapter:
        if isinstance(options[name], list):
            options[name] = [options[name][i] for i in inputs.holders(module)]
    return options.pop("weights"), options.pop("rank"), options


def _each(
    found: Method, inputs: Inputs, modules: list[str], given: Callable[[str], tuple], seed: int
) -> Iterator[tuple[str, Any]]:
    """What a method that merges one module makes of each."""
    for module in modules:
        weights, rank, options = given(module)
        terms = inputs.terms(module, weights)
        with _naming(module):
            merged = found.function(terms, rank, module_generator(seed, module), **options)
        yield module, merged


def _whole(
    found: Method, inputs: Inputs, modules: list[str], given: Callable[[str], tuple], seed: int
) -> Iterator[tuple[str, Any]]:
    """What a method that merges all modules at once makes of them; those of other options are another batch."""
    weights, ranks, batches = {}, {}, []
    for module in modules:
        weights[module], ranks[module], options = given(module)
        members = next((members for same, members in batches if same == options), None)
        if members is None:
            batches.append((options, members := []))
        members.append(module)
    for options, members in batches:
        terms = _OnDemand(members, lambda module: inputs.terms(module, weights[module]))
        yield from found.function(terms, ranks.__getitem__, partial(module_generator, seed), **options)


class _OnDemand(Mapping[str, list[Term]]):
    """Module path to terms, which are made when they are looked up."""

    def __init__(self, modules: list[str], terms: Callable[[str], list[Term]]) -> None:
        self._modules, self._terms = dict.fromkeys(modules), terms

    def __getitem__(self, module: str) -> list[Term]:
        if module not in self._modules:
            raise KeyError(module)
        return self._terms(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """Puts the module in front of the errors of a method, which knows only its terms."""
    try:
        yield
    except LorakernError as error:
        raise LorakernError(f"{module}: {error}") from None


def check_arguments(found: Method, arguments: Mapping[str, Any], count: int) -> None:
    """Raise unless weights, rank and the method's options, all in `arguments`, are what it takes."""
    options = dict(arguments)
    weights, rank = options.pop("weights"), options.pop("rank")
    check_options(found.name, found.options, options)
    for name, value in options.items():
        if isinstance(value, list) and found.options[name].per_adapter and len(value) != count:
            raise LorakernError(f"{name} must have {count} numbers, one for each adapter, got {show(value)}")
    if weights is not None and not _are_weights(weights, count):
        raise LorakernError(f"weights must be None or a list of {count} numbers, one per adapter, got {show(weights)}")
    if not _is_rank(rank):
        raise LorakernError(
            f"rank must be None, a positive integer, or a share of the energy above 0 and below 1, got {show(rank)}"
        )


def _are_weights(weights: Any, count: int) -> bool:
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != count:
        return False
    return all(isinstance(w, numbers.Real) and not isinstance(w, bool) and math.isfinite(w) for w in weights)


def _is_rank(rank: Any) -> bool:
    if isinstance(rank, int) and not isinstance(rank, bool):
        return rank >= 1
    return rank is None or (isinstance(rank, float) and 0 < rank < 1)


def _results(
    found: Method,
    inputs: Inputs,
    modules: list[str],
    merged: Iterator[tuple[str, Any]],
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> Iterator[tuple[str, LoraFactors]]:
    """The merged factors in the wanted dtype, every module once; raises for a method that breaks its word."""
    left = dict.fromkeys(modules)
    for module, result in merged:
        if module not in left:
            raise LorakernError(f"{found.name}: it yielded {show(module)}, which is done or unknown; mend the method")
        del left[module]
        yield module, _result(found, inputs, module, result, dtype)
        if progress is not None:
            progress(len(modules) - len(left), len(modules), module)
    if left:
        raise LorakernError(f"{found.name}: it yielded nothing for {next(iter(left))}; mend the method")


def _result(found: Method, inputs: Inputs, module: str, result: Any, dtype: torch.dtype | None) -> LoraFactors:
    shape, common, device = inputs.target(module)
    try:
        A, B, scale = result if len(result) == 3 else (*result, 1.0)
        if A.shape[0] == B.shape[1] == 0:
            # PEFT's format has no rank 0
            A, B = A.new_zeros(1, shape[1]), B.new_zeros(shape[0], 1)
        merged = checked(module, (A.to(device, dtype or common), B.to(device, dtype or common), scale))
    except (LorakernError, TypeError, AttributeError, ValueError) as error:
        raise LorakernError(f"{module}: {found.name} must return (A, B) or (A, B, scale): {error}") from error
    if (merged.d_out, merged.d_in) != shape:
        got = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
        raise LorakernError(f"{module}: {found.name} returned {got} for an update of shape {shape}; mend the method")
    if not (all_finite(merged.A) and all_finite(merged.B)):
        raise LorakernError(
            f"{module}: the merged factors are not finite in {merged.A.dtype}; merge with dtype=torch.float32, or with "
            "smaller weights"
        )
    return merged
