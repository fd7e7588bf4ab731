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
    """Every token to the one slot: indices (T, 1), and their plan."""

    indices: torch.Tensor
    plan: Plan


class Layer:
    """The ranks of all adapters of one layer, one after the other in one slot, so that no rank is padded.

    A (1, R, d_in), B (1, d_out, R), their transposes for the backward, and for each of the R ranks its adapter's place
    among the holders (`owner`), that adapter's scale, and which ranks have the same place within theirs (`crossing`,
    (R, R) of 0 and 1).
    """

    def __init__(self, slots: LayerSlots, factors: Mapping[int, LoraFactors]) -> None:
        self.holders = list(factors)
        self.d_in, self.d_out = slots.d_in, slots.d_out
        scale, group = slots.bank.scale, slots.bank.group
        given, like = list(factors.values()), {"dtype": group.dtype, "device": group.device}
        self.A = torch.cat([f.A.to(**like) for f in given])[None]
        self.B = torch.cat([f.B.to(**like) for f in given], dim=1)[None].contiguous()
        # as the kernels take them: B^T in the place of A, and A^T in that of B
        self.B_t, self.A_t = self.B.mT.contiguous(), self.A.mT.contiguous()
        ranks = torch.tensor([f.rank for f in given])
        self.owner = torch.arange(len(given)).repeat_interleave(ranks).to(group.device)
        place = torch.cat([torch.arange(rank) for rank in ranks.tolist()]).to(group.device)
        self.crossing = (place[:, None] == place).to(scale.dtype)
        self.scale = torch.tensor([f.scale for f in given], dtype=scale.dtype, device=group.device)[self.owner]


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
        gates: (M, N) float32 or float64, set by the caller; autograd follows them. (C, M, N) are gates for each of C
            equal parts of the batch, one after the other. None is the base model.
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
        self._rows = None if gates is None else gates.unbind(-2)

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
            if gates.shape[-1] > len(layer.holders):
                gates = gates[..., layer.holders]
            route = self._route(x.numel() // layer.d_in, x.device)
            if gates.dim() > 1:
                gates = gates.repeat_interleave(len(route.indices) // len(gates), dim=0)
            return _GatedUpdate.apply(y, x, gates, layer, route, self.crossed)

        return add_update

    def _route(self, tokens: int, device: torch.device) -> Route:
        key = tokens, device
        if key not in self._routes:
            # batches of ever new lengths would fill the memory
            if len(self._routes) >= 64:
                self._routes.clear()
            indices = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
            self._routes[key] = Route(indices, plan(indices, 1))
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
    """y += sum_i gates[i] s_i B_i (A_i x), in place; differentiable by y, x and gates, (N,) or (T, N).

    With ``h_i = A_i x`` and ``g_i = B_i^T dy``: ``dx = sum_i gates[i] s_i A_i^T g_i``, ``dgates[i] = s_i <h_i, g_i>``
    summed over the tokens that share them.
    """

    @staticmethod
    def forward(ctx, y, x, gates, layer, route, crossed):
        x_rows = x.reshape(-1, layer.d_in).to(layer.A.dtype)
        # (T, R), and what each rank is multiplied by, (R,) or (T, R)
        h = shrink(x_rows, layer.A, route.indices, plan=route.plan)[0, :, 0]
        if crossed:
            h = (h * gates[..., layer.owner]) @ layer.crossing.to(h.dtype)
        by_rank = gates[..., layer.owner] * layer.scale
        _expand_into(y.view(-1, layer.d_out), h * by_rank, layer.B, route)
        ctx.layer, ctx.route, ctx.x_like, ctx.crossed = layer, route, (x.shape, x.dtype), crossed
        ctx.save_for_backward(h, gates, by_rank)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if ctx.crossed:
            raise LorakernError("crossed gates have no gradient; search them under torch.no_grad")
        h, gates, by_rank = ctx.saved_tensors
        layer, route, (shape, dtype) = ctx.layer, ctx.route, ctx.x_like
        dy_rows = dy.reshape(-1, layer.d_out).to(layer.B.dtype)
        g = shrink(dy_rows, layer.B_t, route.indices, plan=route.plan)[0, :, 0]
        dx = dgates = None
        if ctx.needs_input_grad[1]:
            dx = dy_rows.new_zeros(dy_rows.shape[0], layer.d_in)
            dx = _expand_into(dx, g * by_rank, layer.A_t, route).view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            products = h * g if gates.dim() > 1 else torch.linalg.vecdot(h, g, dim=0)
            dgates = torch.zeros_like(gates).index_add_(-1, layer.owner, products * layer.scale)
        return dy, dx, dgates, None, None, None


def _expand_into(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor, route: Route) -> torch.Tensor:
    """y += B h, with h (T, R); by way of B's dtype where that of y is another, as under autocast."""
    target = y if y.dtype == B.dtype else torch.zeros_like(y, dtype=B.dtype)
    expand(target, h[None, :, None], B, route.indices, plan=route.plan)
    return y if target is y else y.add_(target)
