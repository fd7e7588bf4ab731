"""The low-rank products of vLLM's LoRA layers on lorakern's ops. vLLM imports it when LoRA is enabled."""

import functools
from typing import NamedTuple

import torch
from vllm.logger import init_logger
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.utils.import_utils import resolve_obj_by_qualname

from lorakern.errors import LorakernError
from lorakern.integrations import vllm as plugin
from lorakern.integrations.vllm.factors import Factors
from lorakern.integrations.vllm.layers import follow
from lorakern.ops import Plan, bgmv, expand, plan, shrink

logger = init_logger("vllm.lorakern")


class Route(NamedTuple):
    """The slot of each row, and the grouping of the rows by slot that every layer of a step shares."""

    indices: torch.Tensor
    plan: Plan


def _factors(lora_a, lora_b) -> Factors:
    """Of a call that no LayerWrapper makes: a trace would keep the routes of one step for all."""
    if torch.compiler.is_compiling():
        raise LorakernError("a LoRA layer without a LayerWrapper cannot be compiled: start vLLM with --enforce-eager")
    return Factors(lora_a, lora_b)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


class PunicaWrapper(PunicaWrapperBase):
    """Adds the update of each row's own adapter to the output of a layer; rows without one keep their bits.

    A and B are what vLLM allocates: (slots, 1, r_max, d_in) and (slots, 1, d_out, r_max). Keywords that an op does not
    know are ignored, as vLLM's own wrappers do (some layers pass a misspelt ``add_input=True``). Called directly, the
    methods take all ranks of all slots; layers that an adapter was activated in come through their LayerWrapper.

    Mixture-of-experts calls go to vLLM's own wrapper for the device.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        follow(LoRAModelManager)
        self._make_own = functools.partial(_own_wrapper, max_num_batched_tokens, max_batches, device, **kwargs)
        self._own: PunicaWrapperBase | None = None
        self._metadata: tuple | None = None
        self._routes: dict[tuple[bool, int, int], Route] = {}
        self._idle = True
        logger.info("lorakern serves the LoRA layers on %s; LORAKERN_VLLM=0 turns it off.", device)

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        # A padded batch has more rows than the mapping: those have no adapter.
        self._token_lora_indices[self.indices_len[0] :].fill_(-1)
        self._sampler_indices[self.indices_len[1] :].fill_(-1)
        self.is_prefill = mapping.is_prefill
        self._routes.clear()
        # A captured graph replays for steps with adapters too: only the CPU skips those without.
        used = any(mapping.index_mapping) or any(mapping.prompt_mapping)
        self._idle = not used and self._token_lora_indices.device.type == "cpu"
        self._metadata = mapping, lora_index_to_id, max_loras, vocab_size
        if self._own is not None:
            self._own.update_metadata(*self._metadata, **kwargs)

    def _route(self, rows: int, slots: int, sampled: bool = False) -> Route:
        """Of the tokens of this step, or of the rows whose logits are sampled."""
        key = sampled, rows, slots
        route = self._routes.get(key)
        if route is None:
            indices = (self._sampler_indices if sampled else self._token_lora_indices)[:rows]
            route = self._routes[key] = Route(indices, plan(indices, slots))
        return route

    def add_update(self, y, x, factors: Factors, scale: float, add_inputs: bool, sampled: bool) -> None:
        """``y[t, slice] += scale * B_slice @ (A_slice @ x[t])``; sampled: the rows are those that get logits."""
        if self._idle:
            return
        if x.dim() != 2 or y.dim() != 2:
            y, x = _rows(y), _rows(x)
        indices, grouped = self._route(x.shape[0], factors.num_slots, sampled)
        scale = None if scale == 1 else scale
        for A, B, ranks, column in factors.groups:
            if sampled and B[0].shape[1] > y.shape[1]:  # the vocabulary of adapters may be padded further
                B = [B[0][:, : y.shape[1]]]
            if x.dtype == y.dtype == B[0].dtype:
                bgmv(y, x, A, B, indices, scale=scale, ranks=ranks, plan=grouped, y_offset=column,
                     accumulate=add_inputs, packed=factors.packed)  # fmt: skip
            else:
                delta = B[0].new_zeros(len(y), sum(b.shape[1] for b in B))
                bgmv(delta, x.to(B[0].dtype), A, B, indices, scale=scale, ranks=ranks, plan=grouped,
                     packed=factors.packed)  # fmt: skip
                _merge(y, delta, indices, column, add_inputs)

    def shrink_to(self, h, x, factors: Factors, scale: float) -> None:
        """``h[slice][t] = scale * A_slice @ x[t]``, zero for rows without an adapter."""
        x = _rows(x)
        indices, grouped = self._route(x.shape[0], factors.num_slots)
        for i, A in enumerate(factors.A):
            ranks = None if factors.ranks_a is None else factors.ranks_a[i]
            shrunk = shrink(x.to(A.dtype), A, indices, ranks=ranks, plan=grouped)
            torch.mul(shrunk[0, :, 0], scale, out=_rows(h[i]))

    def add_expanded(self, y, h, factors: Factors, offset: int, add_inputs: bool) -> None:
        """``y[t, slice] += B_slice @ h[slice][t]``, the slices side by side from column ``offset`` on."""
        if self._idle:
            return
        y = _rows(y)
        indices, grouped = self._route(y.shape[0], factors.num_slots)
        for i, B in enumerate(factors.B):
            ranks = None if factors.ranks_b is None else factors.ranks_b[i]
            of_slice = _rows(h[i] if len(factors.B) > 1 or h.dim() == 3 else h).to(torch.float32).contiguous()
            of_slice = of_slice.view(1, len(of_slice), 1, -1)
            if y.dtype == B.dtype:
                expand(y, of_slice, B, indices, ranks=ranks, plan=grouped, y_offset=offset, accumulate=add_inputs,
                       packed=factors.packed)  # fmt: skip
            else:
                delta = B.new_zeros(len(y), B.shape[1])
                expand(delta, of_slice, B, indices, ranks=ranks, plan=grouped, packed=factors.packed)
                _merge(y, delta, indices, offset, add_inputs)
            offset += B.shape[1]

    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, add_inputs=True, **kwargs
    ) -> None:
        self.add_update(y, x, _factors(lora_a_stacked, lora_b_stacked), float(scale), add_inputs, False)

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs) -> None:
        self.add_update(y, x, _factors((lora_a_stacked,), (lora_b_stacked,)), float(scale), True, True)

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs) -> None:
        self.shrink_to(y, x, _factors(lora_a_stacked, lora_a_stacked), float(scale))

    def add_expand(
        self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs
    ) -> None:  # fmt: skip
        self.add_expanded(y, x, _factors((), lora_b_stacked), offset_start, add_inputs)

    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs) -> None:
        """``y[t] += B @ x[t]``, where x holds the columns of A that the tokens chose."""
        self.add_expanded(y, x, _factors((), (lora_b_stacked,)), 0, add_inputs)

    def apply_lora_full_linear(self, y, x, weight_stacked, bias_stacked, module_enabled) -> None:
        """``y[t] = W[i] @ x[t] + bias[i]`` for the sampled rows whose slot i has a whole layer of its own."""
        weights = weight_stacked.squeeze(1) if weight_stacked.dim() == 4 else weight_stacked
        indices, grouped = self._route(x.shape[0], len(weights), sampled=True)
        full = shrink(x, weights, indices, plan=grouped)[0, :, 0].to(y.dtype)
        slot = indices.clamp_min(0)
        served = (indices >= 0) & module_enabled[slot]
        y.copy_(torch.where(served[:, None], full + bias_stacked[slot].to(y.dtype), y))

    def vllms_own(self) -> PunicaWrapperBase:
        """vLLM's wrapper for the device: made when experts first ask for it, and kept in step from then on."""
        if self._own is None:
            self._own = self._make_own()
            if self._metadata is not None:
                self._own.update_metadata(*self._metadata)
        return self._own

    @property
    def token_mapping_meta(self):
        return self.vllms_own().token_mapping_meta

    def moe_lora_align_block_size(self, *args, **kwargs):
        return self.vllms_own().moe_lora_align_block_size(*args, **kwargs)

    def add_lora_fused_moe(self, *args, **kwargs):
        return self.vllms_own().add_lora_fused_moe(*args, **kwargs)

    def add_lora_w13(self, *args, **kwargs):
        return self.vllms_own().add_lora_w13(*args, **kwargs)

    def add_lora_w2(self, *args, **kwargs):
        return self.vllms_own().add_lora_w2(*args, **kwargs)


def _own_wrapper(*args, **kwargs) -> PunicaWrapperBase:
    return resolve_obj_by_qualname(plugin.own_wrapper())(*args, **kwargs)


def _merge(y: torch.Tensor, delta: torch.Tensor, indices: torch.Tensor, offset: int, add: bool) -> None:
    """Put the update of another dtype into its columns of y, for the rows that have an adapter."""
    target = y.narrow(1, offset, delta.shape[1])
    new = target + delta if add else delta
    target.copy_(torch.where((indices >= 0)[:, None], new.to(y.dtype), target))
