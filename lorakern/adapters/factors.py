"""`LoraFactors`, and what every adapter's factors must obey."""

import math
import numbers
from typing import Any, NamedTuple

import torch

from lorakern.adapters.json_file import show
from lorakern.adapters.peft_refusals import PREFIX
from lorakern.backends import cpu
from lorakern.errors import LorakernError

MAX_NAME_CHARS = 1000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoraFactors(NamedTuple):
    """The low-rank update of one linear layer: y += scale * B @ (A @ x).

    Args:
        A: (r, d_in), float16, bfloat16, float32 or float64.
        B: (d_out, r), likewise.
        scale: a finite number; PEFT's alpha / r, or alpha / sqrt(r) for rsLoRA.

    The layout is the same for `nn.Linear` and for GPT-2's `Conv1D`; only the dense update scale * B @ A is to be
    transposed for the latter's (d_in, d_out) weight.

    >>> import torch
    >>> factors = LoraFactors(torch.ones(4, 6), torch.ones(5, 4), 0.5)
    >>> factors.rank, factors.d_in, factors.d_out
    (4, 6, 5)
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return self.B.shape[0]


def checked(name: Any, value: Any) -> LoraFactors:
    """`value` as `LoraFactors` that PEFT's format can hold, or a `LorakernError` that names the module."""
    check_name(name)
    try:
        A, B, scale = value
    except (TypeError, ValueError):
        raise LorakernError(f"{name}: factors must be a tuple (A, B, scale), got {show(value)}") from None
    for letter, tensor in (("A", A), ("B", B)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES or tensor.ndim != 2:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else show(tensor)
            takes = "a matrix of float16, bfloat16, float32 or float64"
            raise LorakernError(f"{name}: {letter} must be {takes}, got {got}")
    check_shapes(name, tuple(A.shape), tuple(B.shape))
    if not isinstance(scale, numbers.Real) or not math.isfinite(float(scale) * A.shape[0]):
        raise LorakernError(f"{name}: scale must be a number, and scale * rank finite, got {show(scale)}")
    return LoraFactors(A, B, float(scale))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor, not empty, holds neither NaN nor infinity."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and cpu.missing() is None:
        return cpu.all_finite(tensor)
    # The extremes say so, a NaN being one of them, in a tenth of the time of torch.isfinite, which makes tensors.
    return all(math.isfinite(extreme.item()) for extreme in tensor.detach().aminmax())


def check_name(name: Any, where: str = "") -> None:
    """Raise unless `name` can be a module path; `where` names the file."""
    plain = isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()
    # an empty part, as in "..", or a slash would make it a file's path for whoever writes one file per module
    plain = plain and all(part and part == part.strip() for part in name.split(".")) and not set(name) & set("/\\")
    if not plain or name.startswith(PREFIX):
        raise LorakernError(
            f"{where}a module path must be the printable name of a module of the base model, such as "
            f"'model.layers.0.self_attn.q_proj', without {PREFIX!r}, slashes and empty parts, and of at most "
            f"{MAX_NAME_CHARS} characters; got {show(name)}"
        )


def check_shapes(where: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Raise unless `a` is (r, d_in) and `b` is (d_out, r), none of them 0."""
    if len(a) != 2 or len(b) != 2:
        raise LorakernError(
            f"{where}: lora_A {a} and lora_B {b} must be matrices (r, d_in) and (d_out, r); "
            "LoRA on a convolution is not supported: leave such modules out, or merge them into the base"
        )
    if 0 in a + b:
        raise LorakernError(
            f"{where}: lora_A {a} and lora_B {b} must not be empty; leave a module of rank 0 out, or, if the adapter "
            "was trained with ZeRO-3 or FSDP, gather the shards before saving"
        )
    if a[0] != b[1]:
        raise LorakernError(
            f"{where}: the ranks of lora_A (r, d_in) = {a} and lora_B (d_out, r) = {b} differ: {a[0]} and {b[1]}; "
            "the two are not of one adapter, save it again"
        )
