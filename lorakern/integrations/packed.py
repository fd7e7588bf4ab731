"""A causal language model of transformers that runs the tokens of many sequences in one forward, packed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from lorakern.errors import LorakernError

_NAME = "lorakern_packed"
_BUCKET = 32  # a token that is decoded sees its row's cache up to a multiple of it
_FIRST_CAPACITY = 256


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of the sequence in one row of the cache; `start` is the position of the first."""

    row: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass
class Packing:
    """Where the tokens of a forward are: what attention needs, the same in every layer.

    Attributes:
        rows, positions: (n,) int64, of the n tokens that are none of the padding.
        pieces: of more than one token, each as (piece, its first token in the forward).
        groups: of single tokens whose caches are read to the same length: (tokens, rows, length, mask).
    """

    rows: torch.Tensor
    positions: torch.Tensor
    pieces: list[tuple[Piece, int]] = field(default_factory=list)
    groups: list[tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]] = field(default_factory=list)


class PackedModel:
    """The tokens of many sequences as one sequence of a fixed length, each with a row of the key and value cache.

    All forwards have one of two shapes: `max_rows` tokens, one for each row that decodes, or `block` tokens, pieces of
    prompts. So what a matrix product does for a token does not depend on the tokens beside it, and as attention is
    computed from a row's own length, a sequence gets the same bits alone and in any company.

    Args:
        model: a causal language model of transformers with attention over all previous tokens, in eval mode. Its
            attention implementation is replaced inside of a forward.
        max_rows: rows of the cache, and the most sequences that decode at once.
        block: tokens of a forward over prompts.
        max_tokens: the most tokens of a sequence. The cache grows up to it as it is needed.

    Raises:
        LorakernError: a model of another kind.

    Tokens of many requests in one batch as in Orca and vLLM (arXiv 2309.06180), with one contiguous cache a row.
    """

    def __init__(self, model: torch.nn.Module, *, max_rows: int = 16, block: int = 64, max_tokens: int = 2048) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "lm_head") or not hasattr(config, "_attn_implementation"):
            raise LorakernError(f"model must be a causal language model of transformers; got {type(model).__name__}")
        limit = getattr(config, "max_position_embeddings", None) or max_tokens
        self.model = model
        self.max_rows, self.block = max_rows, block
        self.max_tokens = min(max_tokens, limit)
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._capacity = min(_FIRST_CAPACITY, self.max_tokens)
        _register()

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits (len(pieces), vocabulary) of the last token of each piece; at most `max_rows` pieces, `block` tokens.

        Earlier pieces of the same sequence must have run before.
        """
        return self._forward(pieces, self.block)

    @torch.inference_mode()
    def decode(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """The same for pieces of one token each."""
        return self._forward(pieces, self.max_rows)

    def _forward(self, pieces: Sequence[Piece], size: int) -> torch.Tensor:
        device = self.model.device
        self._grow(max(piece.end for piece in pieces))
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [position for piece in pieces for position in range(piece.start, piece.end)]
        rows = [piece.row for piece in pieces for _ in piece.tokens]
        padding = [0] * (size - len(tokens))
        packing = Packing(torch.tensor(rows, device=device), torch.tensor(positions, device=device))
        first, last, single = 0, [], defaultdict(list)
        for piece in pieces:
            # in a forward over prompts a piece of one token is a piece like any other
            if size == self.block:
                packing.pieces.append((piece, first))
            else:
                single[-(-piece.end // _BUCKET) * _BUCKET].append((first, piece))
            first += len(piece.tokens)
            last.append(first - 1)
        for length, members in single.items():
            ends = torch.tensor([piece.end for _, piece in members], device=device)
            packing.groups.append((
                torch.tensor([token for token, _ in members], device=device),
                torch.tensor([piece.row for _, piece in members], device=device),
                length,
                (torch.arange(length, device=device) < ends[:, None])[:, None, None],
            ))  # fmt: skip
        keep = torch.tensor(last + [0] * (self.max_rows - len(last)), device=device)
        config, was = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = _NAME
        try:
            logits = self.model(
                input_ids=torch.tensor([tokens + padding], device=device),
                position_ids=torch.tensor([positions + padding], device=device),
                use_cache=False,
                logits_to_keep=keep,
                lorakern_packing=(packing, self),
            ).logits
        finally:
            config._attn_implementation = was
        return logits[0, : len(last)]

    def cached(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each (rows, heads, capacity, head_dim)."""
        if layer not in self._cache:
            shape = self.max_rows, like.shape[1], self._capacity, like.shape[3]
            self._cache[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self._cache[layer]

    def _grow(self, length: int) -> None:
        """Room for `length` tokens, in whole buckets."""
        length = -(-length // _BUCKET) * _BUCKET
        if length <= self._capacity:
            return
        self._capacity = max(length, min(2 * self._capacity, -(-self.max_tokens // _BUCKET) * _BUCKET))
        for layer, pair in self._cache.items():
            missing = self._capacity - pair[0].shape[2]
            self._cache[layer] = tuple(F.pad(tensor, (0, 0, 0, missing)) for tensor in pair)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    lorakern_packing: tuple[Packing, PackedModel] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed tokens, each to those of its own row: (1, heads, T, head_dim) to (1, T, heads, head_dim)."""
    if other := [name for name in ("sliding_window", "softcap", "s_aux") if options.get(name) is not None]:
        raise LorakernError(f"model: its attention has {other[0]}, which packed sequences do not have yet")
    packing, model = lorakern_packing
    keys, values = model.cached(module.layer_idx, key)
    count = len(packing.rows)
    keys[packing.rows, :, packing.positions] = key[0, :, :count].transpose(0, 1)
    values[packing.rows, :, packing.positions] = value[0, :, :count].transpose(0, 1)
    out = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
    for piece, first in packing.pieces:
        span = slice(first, first + len(piece.tokens))
        own = slice(piece.row, piece.row + 1)
        mask = None
        if piece.start:
            positions = torch.arange(piece.end, device=query.device)
            mask = positions <= positions[piece.start :, None]
        seen = F.scaled_dot_product_attention(
            query[:, :, span],
            keys[own, :, : piece.end],
            values[own, :, : piece.end],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        out[span] = seen[0].transpose(0, 1)
    for tokens, rows, length, mask in packing.groups:
        seen = F.scaled_dot_product_attention(
            query[0, :, tokens].transpose(0, 1)[:, :, None],
            keys[rows, :, :length],
            values[rows, :, :length],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=True,
        )
        out[tokens] = seen[:, :, 0]
    return out[None], None


def _register() -> None:
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise LorakernError("model: cannot import transformers; run `pip install 'lorakern[transformers]'`") from error
    AttentionInterface.register(_NAME, _attend)
