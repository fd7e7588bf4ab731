"""LoRAKernelMeta of vLLM 0.32: where the tokens of each adapter are, in tensors that live as long as the engine."""

from bisect import bisect_left
from dataclasses import dataclass, field

import torch

from lorakern.ops import _checks as check
from lorakern.ops import plan


@dataclass
class LoRAKernelMeta:
    """The metadata of a step, as `lora_shrink` and `lora_expand` take it. Fields and values of vLLM 0.32.

    >>> import torch
    >>> meta = LoRAKernelMeta.make(2, 8, "cpu")
    >>> meta.prepare_tensors(torch.tensor([1, -1, 1]))
    >>> [tensor.tolist() for tensor in meta.meta_args(3, True)]
    [[1, -1, 1], [1, 0, 2], [1, 2, 0], [0, 1, 3, 0], [-1, 1, -1], [False], [2]]
    """

    token_lora_mapping: torch.Tensor
    token_indices_sorted_by_lora_ids: torch.Tensor
    active_lora_ids: torch.Tensor
    num_tokens_per_lora: torch.Tensor
    lora_token_start_loc: torch.Tensor
    no_lora_flag_cpu: torch.Tensor
    num_active_loras_cpu: torch.Tensor
    default_num_active_loras_cpu: torch.Tensor
    captured_lora_counts: list[int] = field(default_factory=list)

    @staticmethod
    def make(
        max_loras: int,
        max_num_tokens: int,
        device: torch.device | str,
        captured_lora_counts: list[int] | None = None,
    ) -> "LoRAKernelMeta":
        """Tensors for steps of up to max_num_tokens tokens over max_loras slots. Signature of vLLM 0.32."""

        def integers(size, value=0, device=device):
            return torch.full((size,), value, dtype=torch.int32, device=device)

        return LoRAKernelMeta(
            token_lora_mapping=integers(max_num_tokens, -1),
            token_indices_sorted_by_lora_ids=integers(max_num_tokens),
            active_lora_ids=integers(max_loras + 1, -1),
            num_tokens_per_lora=integers(max_loras + 1),
            lora_token_start_loc=integers(max_loras + 2),
            no_lora_flag_cpu=torch.zeros(1, dtype=torch.bool, device="cpu"),
            num_active_loras_cpu=integers(1, device="cpu"),
            default_num_active_loras_cpu=integers(1, max_loras + 1, device="cpu"),
            captured_lora_counts=sorted(captured_lora_counts or []),
        )

    def prepare_tensors(self, token_lora_mapping: torch.Tensor) -> None:
        """Fill the tensors for a step, in place.

        Args:
            token_lora_mapping: (T,) int32 or int64, the slot of each token, -1 for none. On a GPU nothing waits for
                its values: the flag then stays False and all slots count as active, which is always right.

        Raises:
            LorakernError: more tokens than there is room for, or (on the CPU) a slot out of range.
        """
        slots, tokens = self.active_lora_ids.shape[0] - 1, token_lora_mapping.shape[0]
        if tokens > self.token_lora_mapping.shape[0]:
            takes = f"have at most {self.token_lora_mapping.shape[0]} tokens"
            check.fail("prepare_tensors", "token_lora_mapping", takes, check.describe(token_lora_mapping))
        order, ends = plan(token_lora_mapping, slots)
        readable = token_lora_mapping.device.type == "cpu"
        no_lora = readable and int(ends[-1]) == 0
        self.no_lora_flag_cpu.fill_(no_lora)
        self.num_active_loras_cpu.fill_(0 if no_lora else slots + 1)
        if no_lora:
            self.active_lora_ids.fill_(-1)
            self.num_tokens_per_lora.zero_()
            self.lora_token_start_loc.zero_()
            return

        # the plan has the tokens without an adapter last, vLLM has them first
        rows = torch.arange(tokens, device=order.device)
        self.token_lora_mapping[:tokens].copy_(token_lora_mapping, non_blocking=True)
        self.token_indices_sorted_by_lora_ids[:tokens].copy_(
            order[(rows + ends[-1]) % max(tokens, 1)], non_blocking=True
        )

        ids = torch.arange(-1, slots, device=order.device)
        counts = torch.cat([tokens - ends[-1:], ends.diff()])
        # slots in use move to the front and keep their order
        front = (counts == 0).int().argsort(stable=True)
        ids, counts = ids[front], counts[front]
        used = counts > 0
        self.active_lora_ids.copy_(torch.where(used, ids, -1), non_blocking=True)
        self.num_tokens_per_lora.copy_(counts, non_blocking=True)
        self.lora_token_start_loc[1:].copy_(torch.where(used, counts.cumsum(0), 0), non_blocking=True)
        if readable:
            self.num_active_loras_cpu.fill_(self._captured(int(used.sum())))

    def _captured(self, active):
        """The smallest captured count that covers this many."""
        place = bisect_left(self.captured_lora_counts, active)
        return self.captured_lora_counts[place] if place < len(self.captured_lora_counts) else active

    def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[torch.Tensor, ...]:
        """The seven tensors that `lora_shrink` and `lora_expand` take, for token_nums tokens. vLLM 0.32."""
        return (
            self.token_lora_mapping[:token_nums],
            self.token_indices_sorted_by_lora_ids[:token_nums],
            self.num_tokens_per_lora,
            self.lora_token_start_loc,
            self.active_lora_ids,
            self.no_lora_flag_cpu,
            self.num_active_loras_cpu if specialize_active_lora else self.default_num_active_loras_cpu,
        )
