"""LoraWeight and BatchedLoraWeight of Punica, the latter with the weights themselves in place of their addresses."""

from collections.abc import Sequence

import torch


class LoraWeight:
    """One adapter's factors for all layers: wa (layers, r, d_in) and wb (layers, r, d_out), zero at first.

    Signatures of Punica 591b5989.

    >>> weight = LoraWeight(2, 8, 6, 4, torch.float32, torch.device("cpu"))
    >>> weight.wa.shape, weight.wb.shape, weight.lora_rank
    (torch.Size([2, 4, 8]), torch.Size([2, 4, 6]), 4)
    """

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        out_features: int,
        lora_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.wa = torch.zeros(num_layers, lora_rank, in_features, dtype=dtype, device=device)
        # (layers, d_out, r) in memory, as the kernels read it
        self.wb = torch.zeros(num_layers, out_features, lora_rank, dtype=dtype, device=device).mT
        self.num_layers, self.in_features, self.out_features = num_layers, in_features, out_features
        self.lora_rank, self.dtype, self.device = lora_rank, self.wa.dtype, self.wa.device

    def copy_from_tensor(self, a: torch.Tensor, b: torch.Tensor):
        """Take the factors from a (layers, r, d_in) and b (layers, d_out, r)."""
        self.wa.copy_(a)
        self.wb.copy_(b.mT)


class BatchedLoraWeight:
    """The adapters of the segments of a batch: wa_ptr and wb_ptr, as `ops` takes them. Signature of Punica 591b5989."""

    def __init__(self, weights: Sequence[LoraWeight]):
        self.wa_ptr = [weight.wa for weight in weights]
        self.wb_ptr = [weight.wb for weight in weights]
