"""What vLLM's LoRA layers call for their low-rank products, on lorakern's ops. vLLM imports it when LoRA is enabled."""

from typing import NamedTuple

import torch
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from lorakern.integrations.vllm.ranks import Banks, follow
from lorakern.ops import Plan, bgmv, expand, lora_delta, plan, shrink

logger = init_logger("vllm.lorakern")


class Route(NamedTuple):
    """The slot of each row, and the grouping of the rows by slot that every layer of a step shares."""

    indices: torch.Tensor
    plan: Plan


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


class PunicaWrapper(PunicaWrapperBase):
    """Adds the update of each row's own adapter to the output of a layer; rows without one keep their bits.

    A and B are what vLLM allocates: (slots, 1, r_max, d_in) and (slots, 1, d_out, r_max). Keywords that an op does not
    know are ignored, as vLLM's own wrappers do (some layers pass a misspelt ``add_input=True``).

    Mixture-of-experts calls are those of the base class, which vLLM's own CPU class does not implement either.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs) -> None:
        from vllm.lora.model_manager import LoRAModelManager

        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        follow(LoRAModelManager)
        self.banks = Banks()
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

    def _route(self, rows: int, slots: int, sampled: bool = False) -> Route:
        """Of the tokens of this step, or of the rows whose logits are sampled."""
        key = sampled, rows, slots
        route = self._routes.get(key)
        if route is None:
            indices = (self._sampler_indices if sampled else self._token_lora_indices)[:rows]
            route = self._routes[key] = Route(indices, plan(indices, slots))
        return route

    def _add_update(self, y, x, lora_a, lora_b, scale, offset, add_inputs, sampled=False) -> None:
        A, B = self.banks[lora_a], self.banks[lora_b].weights
        weights, ranks = A.weights, A.ranks
        indices, grouped = self._route(x.shape[0], len(weights), sampled)
        columns = y.shape[1] - offset
        if B.shape[1] > columns:  # the vocabulary of the adapters may be padded further than that of the model
            B = B[:, :columns]
        scale = None if scale == 1 else float(scale)
        if x.dtype == y.dtype == weights.dtype:
            bgmv(y, x, weights, B, indices, scale=scale, ranks=ranks, plan=grouped, y_offset=offset,
                 accumulate=add_inputs)  # fmt: skip
        else:
            delta = lora_delta(x.to(weights.dtype), weights, B, indices, scale=scale, ranks=ranks, plan=grouped)
            _merge(y, delta, indices, offset, add_inputs)

    def _add_expanded(self, y, h, lora_b, offset, add_inputs) -> None:
        B = self.banks[lora_b]
        indices, grouped = self._route(y.shape[0], len(B.weights))
        h = h.to(torch.float32).contiguous().view(1, len(h), 1, -1)
        same_dtype = y.dtype == B.weights.dtype
        target = y if same_dtype else B.weights.new_zeros(len(y), B.weights.shape[1])
        expand(target, h, B.weights, indices, ranks=B.ranks, plan=grouped, y_offset=offset if same_dtype else 0,
               accumulate=add_inputs or not same_dtype)  # fmt: skip
        if not same_dtype:
            _merge(y, target, indices, offset, add_inputs)

    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, add_inputs=True, **kwargs
    ) -> None:
        """``y[t, slice] += scale * B_slice @ (A_slice @ x[t])``: every slice with its own ranks."""
        if self._idle:
            return
        y, x = _rows(y), _rows(x)
        offset = 0
        for lora_a, lora_b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            self._add_update(y, x, lora_a, lora_b, scale, offset, add_inputs)
            offset += width

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs) -> None:
        """The same for one slice and the rows that are sampled."""
        if not self._idle:
            self._add_update(_rows(y), _rows(x), lora_a_stacked, lora_b_stacked, scale, 0, True, sampled=True)

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs) -> None:
        """``y[slice][t] = scale * A_slice @ x[t]``, zero for rows without an adapter."""
        x = _rows(x)
        for h, lora_a in zip(y, lora_a_stacked, strict=True):
            A = self.banks[lora_a]
            indices, grouped = self._route(x.shape[0], len(A.weights))
            shrunk = shrink(x.to(A.weights.dtype), A.weights, indices, ranks=A.ranks, plan=grouped)
            torch.mul(shrunk[0, :, 0], scale, out=_rows(h))

    def add_expand(
        self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs
    ) -> None:  # fmt: skip
        """``y[t, slice] += B_slice @ x[slice][t]``, the slices side by side from column ``offset_start`` on."""
        if self._idle:
            return
        y = _rows(y)
        for h, lora_b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            self._add_expanded(y, _rows(h), lora_b, offset_start, add_inputs)
            offset_start += width

    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs) -> None:
        """``y[t] += B @ x[t]``, where x holds the columns of A that the tokens chose."""
        if not self._idle:
            self._add_expanded(_rows(y), _rows(x), lora_b_stacked, 0, add_inputs)

    def apply_lora_full_linear(self, y, x, weight_stacked, bias_stacked, module_enabled) -> None:
        """``y[t] = W[i] @ x[t] + bias[i]`` for the sampled rows whose slot i has a whole layer of its own."""
        weights = self.banks[weight_stacked].weights
        indices, grouped = self._route(x.shape[0], len(weights), sampled=True)
        full = shrink(x, weights, indices, plan=grouped)[0, :, 0].to(y.dtype)
        slot = indices.clamp_min(0)
        served = (indices >= 0) & module_enabled[slot]
        y.copy_(torch.where(served[:, None], full + bias_stacked[slot].to(y.dtype), y))


def _merge(y: torch.Tensor, delta: torch.Tensor, indices: torch.Tensor, offset: int, add: bool) -> None:
    """Put the update of another dtype into its columns of y, for the rows that have an adapter."""
    target = y.narrow(1, offset, delta.shape[1])
    new = target + delta if add else delta
    target.copy_(torch.where((indices >= 0)[:, None], new.to(y.dtype), target))
