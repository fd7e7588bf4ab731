"""Checks of what the retriever is given: names, texts, vectors and what an encoder made of texts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError

MAX_NAME = 255
MAX_DIM = 1 << 16


def check_name(name: Any, where: str = "name") -> str:
    """A name is printable text; it is never used as a path."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise LorakernError(f"{where} must be printable text of 1 to {MAX_NAME} characters, got {show(name)}")
    return name


def check_texts(texts: Any, *, empty: bool = False) -> list[str]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise LorakernError(f"texts must be a list of texts, got {show(texts)}")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise LorakernError(f"texts must be a list of texts, got {show(wrong[0])} among them")
    if not texts and not empty:
        raise LorakernError("texts is empty; give at least one sample text of the adapter's task")
    return list(texts)


def check_rows(value: Any, what: str, count: int | None = None) -> torch.Tensor:
    """(n, d) float64 on the CPU."""
    takes = f"({'n' if count is None else count}, d)"
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else show(value)
        raise LorakernError(f"{what} must be a tensor of floats of shape {takes}, got {got}")
    if (count is not None and len(value) != count) or not 0 < value.shape[1] <= MAX_DIM:
        raise LorakernError(f"{what} must be of shape {takes}, d at most {MAX_DIM}; got {tuple(value.shape)}")
    rows = value.detach().to("cpu", torch.float64)
    # float32 is what is kept
    if not rows.float().isfinite().all():
        raise LorakernError(f"{what} holds NaN, infinity or numbers beyond float32; give finite numbers")
    return rows


def prefixed(texts: list[str], instruction: str) -> list[str]:
    """What the encoder is given for texts."""
    return [f"{instruction}: {text}" for text in texts] if instruction else texts


def embed(encoder: Callable, texts: list[str], instruction: str) -> torch.Tensor:
    """(len(texts), d) float64: what the encoder makes of "instruction: text"."""
    return check_rows(encoder(prefixed(texts, instruction)), "encoder: what it returns", len(texts))


def directions(rows: torch.Tensor, what: str) -> torch.Tensor:
    """Each row over its norm, in float64."""
    norms = rows.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise LorakernError(f"{what} holds a vector of zeros, which has no cosine; take similarity='inner_product'")
    return rows / norms
