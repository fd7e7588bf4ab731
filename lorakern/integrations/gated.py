"""A model that runs all adapters at once, each layer under gates of its own, for what learns or searches the gates.

A and B stay frozen: the backward needs the ranks h and the gradient of the output alone, and computes no dA and no dB.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lorakern.adapters import LoraFactors
from lorakern.errors import LorakernError
from lorakern.integrations.slots import LayerSlots
from lorakern.integrations.targets import find_targets
from lorakern.ops import Plan, expand, plan, shrink


class Route(NamedTuple):
    """Every token to all slots: indices (T, N), and their plan."""

    indices: torch.Tensor
    plan: Plan


class Layer:
    """The adapters of one layer, in slots, and the transposed factors that its backward multiplies by."""

    def __init__(self, slots: LayerSlots, factors: Mapping[int, LoraFactors]) -> None:
        self.holders = list(factors)
        self.d_in, self.d_out = slots.d_in, slots.d_out
        slots.reserve(len(factors), max(f.rank for f in factors.values()))
        for slot, f in enumerate(factors.values()):
            slots.write(slot, f)
        (self.A,), (self.B,), self.scale, self.ranks, _ = slots.bank
        # as the kernels take them: B^T in the place of A, and A^T in that of B
        self.B_t, self.A_t = self.B.mT.contiguous(), self.A.mT.contiguous()


class GatedModel:
    """A model with all adapters on every token: ``y = base(x) + sum_i gates[m, i] s_i B_i (A_i x)`` in layer m.

    Inside of ``with`` it is frozen, in eval mode, and has a hook on every targeted layer; after it, it is what it was.

    Args:
        op: what an error message begins with.
        model: any module whose targeted layers are `torch.nn.Linear` or transformers' `Conv1D`.
        adapters: mappings from module to `LoraFactors`, cast here to the dtype and device of their layer.

    Attributes:
        modules: paths of the M targeted layers, as the adapters name them.
        held: (M, N) bool, which adapter has which module; on the device of the first.
        gates: (M, N) float32 or float64, set by the caller; autograd follows them. None is the base model.
        crossed: whether the ranks of all adapters are summed before B multiplies them, as LoraHub does:
            ``(sum_i gates[m, i] s_i B_i) (sum_j gates[m, j] A_j x)``. Without gradients.

    Raises:
        LorakernError: an adapter that does not fit the model. The model has not changed then.

    >>> import torch, lorakern as lk
    >>> from lorakern.integrations.gated import GatedModel
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    >>> ones = lk.LoraAdapter({"0": (torch.ones(3, 4), torch.ones(2, 3), 0.5)})
    >>> x = torch.ones(1, 4)
    >>> with GatedModel("example", model, [ones, ones]) as gated:
    ...     gated.gates = torch.tensor([[2.0, -1.0]], requires_grad=True)
    ...     mixed = model(x)
    >>> (mixed - model(x)).round().tolist()
    [[6.0, 6.0]]
    """

    def __init__(self, op: str, model: torch.nn.Module, adapters: Sequence[Mapping[str, LoraFactors]]) -> None:
        if not isinstance(model, torch.nn.Module):
            raise LorakernError(f"{op}: model must be a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self.gates = None
        self.crossed = False
        self._routes: dict[tuple, Route] = {}
        self._layers = _layers(op, model, adapters)
        self.modules = list(self._layers)
        first, *_ = self._layers.values()
        self.held = torch.zeros(len(self.modules), len(adapters), dtype=torch.bool, device=first[1].A.device)
        for row, (_, layer) in zip(self.held, self._layers.values(), strict=True):
            row[layer.holders] = True

    @property
    def gates(self) -> torch.Tensor | None:
        return self._gates

    @gates.setter
    def gates(self, gates: torch.Tensor | None) -> None:
        self._gates = gates
        # one node of the graph for all layers
        self._rows = None if gates is None else gates.unbind()

    def __enter__(self) -> "GatedModel":
        self._training = {module: module.training for module in self.model.modules()}
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._hooks = []
        try:
            for parameter in self._trained:
                parameter.requires_grad_(False)
            self.model.eval()
            for m, (module, layer) in enumerate(self._layers.values()):
                self._hooks.append(module.register_forward_hook(self._hook(m, layer), with_kwargs=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for module, training in self._training.items():
            module.training = training

    def _hook(self, m: int, layer: Layer):
        def add_update(module, inputs, named, y):
            if self._rows is None:
                return None
            (x,) = inputs or named.values()
            gates = self._rows[m].to(x.device, layer.scale.dtype)
            if len(gates) > len(layer.holders):
                gates = gates[layer.holders]
            route = self._route(x.numel() // layer.d_in, len(layer.holders), x.device)
            return _GatedUpdate.apply(y, x, gates, layer, route, self.crossed)

        return add_update

    def _route(self, tokens: int, adapters: int, device: torch.device) -> Route:
        key = tokens, adapters, device
        if key not in self._routes:
            # batches of ever new lengths would fill the memory
            if len(self._routes) >= 64:
                self._routes.clear()
            indices = torch.arange(adapters, dtype=torch.int32, device=device).repeat(tokens, 1)
            self._routes[key] = Route(indices, plan(indices, adapters))
        return self._routes[key]


def _layers(
    op: str, model: torch.nn.Module, adapters: Sequence[Mapping[str, LoraFactors]]
) -> dict[str, tuple[torch.nn.Module, Layer]]:
    """Each path that an adapter has, with its layer of the model and the slots of all who have it."""
    paths: dict[torch.nn.Module, str] = {}
    slots: dict[torch.nn.Module, LayerSlots] = {}
    factors: dict[torch.nn.Module, dict[int, LoraFactors]] = {}
    for i, adapter in enumerate(adapters):
        name = str(getattr(adapter, "path", None) or i)
        for path, target in zip(adapter, find_targets(op, model, name, adapter), strict=True):
            known = paths.setdefault(target.module, path)
            if known != path:
                raise LorakernError(
                    f"{op}: adapter {name!r} calls a layer {path!r} that another adapter calls {known!r}; "
                    "rename the modules of one of the two"
                )
            slots.setdefault(target.module, target.slots)
            factors.setdefault(target.module, {})[i] = target.factors
    with torch.no_grad(), torch.inference_mode(False):
        return {path: (module, Layer(slots[module], factors[module])) for module, path in paths.items()}


class _GatedUpdate(torch.autograd.Function):
    """y += sum_i gates[i] s_i B_i (A_i x), in place; differentiable by y, x and gates (N,).

    With ``h_i = A_i x`` and ``g_i = B_i^T dy``: ``dx = sum_i gates[i] s_i A_i^T g_i``, ``dgates[i] = s_i <h_i, g_i>``
    summed over the tokens.
    """

    @staticmethod
    def forward(ctx, y, x, gates, layer, route, crossed):
        x_rows = x.reshape(-1, layer.d_in).to(layer.A.dtype)
        h = shrink(x_rows, layer.A, route.indices, ranks=layer.ranks, plan=route.plan)
        if crossed:
            h = (h * gates[:, None]).sum(2, keepdim=True).expand_as(h).contiguous()
        _expand_into(y.view(-1, layer.d_out), h, layer.B, gates, layer, route)
        ctx.layer, ctx.route, ctx.x_like, ctx.crossed = layer, route, (x.shape, x.dtype), crossed
        ctx.save_for_backward(h, gates)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if ctx.crossed:
            raise LorakernError("crossed gates have no gradient; search them under torch.no_grad")
        h, gates = ctx.saved_tensors
        layer, route, (shape, dtype) = ctx.layer, ctx.route, ctx.x_like
        dy_rows = dy.reshape(-1, layer.d_out).to(layer.B.dtype)
        g = shrink(dy_rows, layer.B_t, route.indices, ranks=layer.ranks, plan=route.plan)
        dx = dgates = None
        if ctx.needs_input_grad[1]:
            dx = dy_rows.new_zeros(dy_rows.shape[0], layer.d_in)
            dx = _expand_into(dx, g, layer.A_t, gates, layer, route).view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            dgates = layer.scale * torch.linalg.vecdot(h, g).sum((0, 1))
        return dy, dx, dgates, None, None, None


def _expand_into(
    y: torch.Tensor, h: torch.Tensor, B: torch.Tensor, gates: torch.Tensor, layer: Layer, route: Route
) -> torch.Tensor:
    """y += sum_i gates[i] s_i B_i h_i; by way of B's dtype where that of y is another, as under autocast."""
    target = y if y.dtype == B.dtype else torch.zeros_like(y, dtype=B.dtype)
    options = {"scale": layer.scale, "ranks": layer.ranks, "plan": route.plan}
    expand(target, h, B, route.indices, gates=gates.expand(route.indices.shape), **options)
    return y if target is y else y.add_(target)
