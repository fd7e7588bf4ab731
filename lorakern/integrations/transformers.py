"""Hugging Face models with many adapters attached: every row of a batch runs its own."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count

import torch

from lorakern.adapters import LoraFactors
from lorakern.errors import LorakernError
from lorakern.integrations.slots import LayerSlots, Rows
from lorakern.integrations.targets import Target, find_targets
from lorakern.ops import bgmv, lora_delta

# The rows that each attached model serves now. Of a ContextVar every thread and asyncio task sees its own value.
_ACTIVE: ContextVar[Mapping["AttachedModel", Rows]] = ContextVar("lorakern_rows", default={})  # noqa: B039


def attach(
    model: torch.nn.Module,
    adapters: Mapping[str, Mapping[str, LoraFactors]],
    *,
    max_adapters: int | None = None,
) -> "AttachedModel":
    """Put adapters into slots beside the linear layers of a model, for `AttachedModel.use` to choose among by row.

    ``y[t] = base(x[t]) + scale * B @ (A @ x[t])`` with the factors of row t's own adapter, by one `lorakern.bgmv` a
    layer. Base weights are not touched and nothing is fused. Layers that see gathered tokens (the experts of a
    mixture) are refused: rows cannot be told apart there.

    Args:
        model: any module whose targeted layers are `torch.nn.Linear` or transformers' `Conv1D`, of a floating dtype.
            Detach before moving or casting it.
        adapters: name to `LoraAdapter`. Its module names are looked up in the model, exactly or, if only one
            module ends so, as the end of a name (a model nested in a wrapper). Factors are cast to the dtype
            and device of their layer, once.
        max_adapters: the most adapters that will ever be attached: slots for all of them are allocated now. By
            default slots grow when needed.

    Raises:
        LorakernError: a module that the model does not have, that is no linear layer or has another shape, or more
            adapters than `max_adapters`. The model has not changed then.

    What PEFT's ``adapter_names=`` does by a loop over adapters (https://github.com/huggingface/peft); the operation
    is BGMV of Punica (arXiv 2310.18547).

    >>> import torch, lorakern as lk
    >>> from lorakern.integrations.transformers import attach
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    >>> lk_model = attach(model, {"ones": lk.LoraAdapter({"0": (torch.ones(3, 4), torch.ones(2, 3), 0.5)})})
    >>> x = torch.ones(2, 4)
    >>> with lk_model.use(["ones", None]):
    ...     served = model(x)
    >>> (served - model(x)).round().tolist()
    [[6.0, 6.0], [0.0, 0.0]]
    """
    if not isinstance(model, torch.nn.Module):
        raise LorakernError(f"attach: model must be a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(adapters, Mapping):
        raise LorakernError(f"attach: adapters must map names to LoraAdapters; got {type(adapters).__name__}")
    if max_adapters is not None and (not isinstance(max_adapters, int) or max_adapters < 1):
        raise LorakernError(f"attach: max_adapters must be None or a positive integer; got {max_adapters!r}")
    attached = AttachedModel(model, max_adapters)
    attached._put("attach", adapters)
    return attached


class AttachedModel:
    """A model with adapters in slots, as `attach` returns it; outside of `use` it is the base model, bit for bit.

    Every targeted layer has a forward hook; modules, parameters, state dict and forwards stay as they are.

    Attributes:
        model: what was given to `attach`; call it, or its `generate`, inside of `use`.
        adapters: the names that `use` takes.
    """

    def __init__(self, model: torch.nn.Module, max_adapters: int | None = None) -> None:
        self.model = model
        self._max_adapters = max_adapters
        self._slots: dict[str, int] = {}
        self._layers: dict[torch.nn.Module, LayerSlots] = {}
        self._hooks: dict[torch.nn.Module, torch.utils.hooks.RemovableHandle] = {}
        self._in_use: Counter[str | None] = Counter()
        self._detached = False
        self._lock = threading.RLock()

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def __repr__(self) -> str:
        state = "detached" if self._detached else f"{len(self._layers)} layers"
        return f"AttachedModel({type(self.model).__name__}, {state}, adapters: {', '.join(self._slots) or 'none'})"

    @contextmanager
    def use(self, rows: Sequence[str | Mapping[str, float] | None]) -> Iterator["AttachedModel"]:
        """Inside the block, row t of every batch runs with the adapter ``rows[t]``, at all its positions; None: base.

        A mapping of names to weights is a mixture of outputs, ``y = base(x) + sum_i w_i scale_i B_i (A_i x)``. A batch
        of a multiple of ``len(rows)`` repeats each row, as beams and num_return_sequences do. Blocks nest, the inner
        one counts. Every thread and asyncio task has its own rows; a thread started inside of the block (for
        a streamer, say) has none, and must run in a `contextvars.copy_context()` to inherit them.

        Args:
            rows: an adapter name, names with their weights, or None, for each row of the batch.

        Raises:
            LorakernError: a name that is not attached, a weight that is no number, no rows, or a detached model; and,
                from a forward inside of the block, a batch that is no multiple of the rows.

        >>> import torch, lorakern as lk
        >>> from lorakern.integrations.transformers import attach
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> lk_model = attach(model, {"ones": lk.LoraAdapter({"0": (torch.ones(3, 4), torch.ones(2, 3), 0.5)})})
        >>> with lk_model.use(["ones"]), lk_model.use([None]):
        ...     served = model(torch.ones(1, 4))
        >>> torch.equal(served, model(torch.ones(1, 4)))
        True
        """
        if isinstance(rows, (str, Mapping)) or not isinstance(rows, Sequence) or not rows:
            raise LorakernError(f"use: rows must be a list of an adapter name or None for each row; got {rows!r}")
        mixtures = [_weighted(row) for row in rows]
        with self._lock:
            self._check_attached("use")
            for name in (name for mixture in mixtures for name, _ in mixture):
                self._check_known("use", name)
            active = Rows([{self._slots[name]: weight for name, weight in mixture} for mixture in mixtures])
            names = {None, *(name for mixture in mixtures for name, _ in mixture)}  # None stands for the block itself
            self._in_use.update(names)
        token = _ACTIVE.set({**_ACTIVE.get(), self: active})
        try:
            yield self
        finally:
            _ACTIVE.reset(token)
            with self._lock:
                self._in_use.subtract(names)

    def add(self, name: str, adapter: Mapping[str, LoraFactors]) -> None:
        """Attach one more adapter, also inside of `use`; free slots are reused, slots and ranks grow where they must.

        Args:
            name: a name that is not attached yet.
            adapter: a `LoraAdapter` whose modules are linear layers of the model.

        Raises:
            LorakernError: the name is taken, the adapter does not fit the model, or `max_adapters` are attached
                already. Nothing has changed then.
        """
        self._put("add", {name: adapter})

    def remove(self, name: str) -> None:
        """Free the slot of an adapter, and let the layers go that no other adapter targets.

        Raises:
            LorakernError: no such adapter, or a `use` block of any thread names it.
        """
        with self._lock:
            self._check_attached("remove")
            self._check_known("remove", name)
            if self._in_use[name] > 0:
                raise LorakernError(f"remove: adapter {name!r} is in use; leave the `use` block that names it first")
            self._clear(self._slots.pop(name))

    def detach(self) -> None:
        """Take every hook and slot away: the model is what it was before `attach`. A second call does nothing.

        Raises:
            LorakernError: a `use` block of any thread is running.
        """
        with self._lock:
            if self._in_use[None] > 0:
                raise LorakernError("detach: the model is in use; leave the `use` block first")
            for name in self.adapters:
                self.remove(name)
            self._detached = True

    def _put(self, op: str, adapters: Mapping[str, Mapping[str, LoraFactors]]) -> None:
        with self._lock:
            self._check_attached(op)
            if duplicate := [name for name in adapters if name in self._slots]:
                raise LorakernError(f"{op}: adapter {duplicate[0]!r} is attached already; remove it, or choose a name")
            total = len(self._slots) + len(adapters)
            if self._max_adapters is not None and total > self._max_adapters:
                hint = "remove one first, or attach with a larger max_adapters"
                raise LorakernError(f"{op}: {total} adapters are more than max_adapters = {self._max_adapters}; {hint}")
            fitted = {name: find_targets(op, self.model, name, adapter) for name, adapter in adapters.items()}
            taken = set(self._slots.values())
            free = (slot for slot in count() if slot not in taken)
            slots = dict(zip(fitted, free, strict=False))
            try:
                with torch.no_grad(), torch.inference_mode(False):
                    self._write(fitted, slots)
            except BaseException:  # out of memory, say: no slot may keep what no name stands for
                for slot in slots.values():
                    self._clear(slot)
                raise
            self._slots.update(slots)

    def _write(self, fitted: Mapping[str, list[Target]], slots: Mapping[str, int]) -> None:
        """Put the adapters into their slots; every layer is grown once for all of them."""
        room: dict[torch.nn.Module, tuple[int, int]] = {}
        for name, targets in fitted.items():
            for module, layer, factors in targets:
                self._layers.setdefault(module, layer)
                num_slots, r_max = room.get(module, (self._max_adapters or 0, 0))
                room[module] = max(num_slots, slots[name] + 1), max(r_max, factors.rank)
        for module, (num_slots, r_max) in room.items():
            self._layers[module].reserve(num_slots, r_max)
        for name, targets in fitted.items():
            for module, _, factors in targets:
                self._layers[module].write(slots[name], factors)
        for module in room.keys() - self._hooks.keys():
            self._hooks[module] = module.register_forward_hook(_hook(self, self._layers[module]), with_kwargs=True)

    def _clear(self, slot: int) -> None:
        with torch.inference_mode(False):
            for module, layer in list(self._layers.items()):
                if slot in layer.bank.group.served:
                    layer.clear(slot)
                if not layer.bank.group.served:
                    del self._layers[module]
                    if module in self._hooks:
                        self._hooks.pop(module).remove()

    def _check_attached(self, op: str) -> None:
        if self._detached:
            raise LorakernError(f"{op}: the model was detached; attach it again")

    def _check_known(self, op: str, name: str) -> None:
        if not isinstance(name, str) or name not in self._slots:
            raise LorakernError(f"{op}: no adapter {name!r} is attached; there are {', '.join(self._slots) or 'none'}")


def _weighted(row: str | Mapping[str, float] | None) -> list[tuple[str, float]]:
    """The adapters of a row and their weights, finite numbers."""
    if not isinstance(row, Mapping):
        return [] if row is None else [(row, 1.0)]
    for name, weight in row.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise LorakernError(f"use: the weight of adapter {name!r} must be a finite number; got {weight!r}")
    return list(row.items())


def _hook(owner: AttachedModel, layer: LayerSlots) -> Callable:
    """The forward hook of one layer. It runs hundreds of times a token: all that can be known before is."""
    d_in, d_out = layer.d_in, layer.d_out
    active = _ACTIVE.get

    def add_update(module, inputs, named, y):
        rows = active().get(owner)
        if rows is None:
            return
        (x,) = inputs or named.values()
        bank = layer.bank
        group = bank.group
        key = group, x.shape, x.dtype, y.dtype, x.device
        try:
            route = rows.routes[key]
        except KeyError:
            route = rows.make_route(key, layer, x, y)
        if route is None:
            return
        x, y = x.reshape(-1, d_in), y.view(-1, d_out)
        options = {"scale": bank.scale, "ranks": bank.ranks, "gates": route.gates, "plan": route.plan}
        if route.same_dtype:
            bgmv(y, x, bank.A, bank.B, route.indices, **options)
        else:
            y.add_(lora_delta(x.to(group.dtype), bank.A, bank.B, route.indices, **options).to(y.dtype))

    return add_update
