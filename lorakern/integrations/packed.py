"""A causal language model of transformers that runs the tokens of many sequences in one forward, packed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
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
        places: (n,) int64, of the n tokens that are none of the padding, where a layer's cache has them: row and
            position as one index.
        pieces: of a forward over prompts: (first token, piece, mask).
        runs: of a forward over single tokens, those that are neighbours in the cache and see the same length of it:
            (first token, its row, mask).
        A mask is added to the scores: (1, 1, tokens, length) and (rows, 1, 1, length).
    """

    places: torch.Tensor
    pieces: list[tuple[int, Piece, torch.Tensor]] = field(default_factory=list)
    runs: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)


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

    def __init__(self, model: torch.nn.Module, *, max_rows: int = 16, block: int = 128, max_tokens: int = 2048) -> None:
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
        places = [row * self._capacity + position for row, position in zip(rows, positions, strict=True)]
        packing = Packing(torch.tensor(places, device=device))
        firsts = [0, *accumulate(len(piece.tokens) for piece in pieces)]
        # in a forward over prompts a piece of one token is a piece like any other
        if size == self.block:
            for first, piece in zip(firsts, pieces, strict=False):
                ends = range(piece.start + 1, piece.end + 1)
                packing.pieces.append((first, piece, self._mask(ends, piece.end)[None, None]))
        else:
            for (offset, buckets), members in groupby(enumerate(pieces), _neighbours):
                ends = {first: piece.end for first, piece in members}
                mask = self._mask(ends.values(), buckets * _BUCKET)[:, None, None]
                packing.runs.append((min(ends), min(ends) + offset, mask))
        last = [first - 1 for first in firsts[1:]]
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
        """Keys and values of a layer, each (rows, capacity, heads, head_dim)."""
        if layer not in self._cache:
            shape = self.max_rows, self._capacity, like.shape[1], like.shape[3]
            self._cache[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self._cache[layer]

    def _mask(self, ends: Iterable[int], length: int) -> torch.Tensor:
        """(ends, length) in the model's dtype: 0 before an end, minus infinity from it on."""
        ends = torch.tensor(list(ends), device=self.model.device)
        mask = torch.zeros(len(ends), length, dtype=self.model.dtype, device=ends.device)
        return mask.masked_fill_(torch.arange(length, device=ends.device) >= ends[:, None], -torch.inf)

    def _grow(self, length: int) -> None:
        """Room for `length` tokens, in whole buckets."""
        length = -(-length // _BUCKET) * _BUCKET
        if length <= self._capacity:
            return
        self._capacity = max(length, min(2 * self._capacity, -(-self.max_tokens // _BUCKET) * _BUCKET))
        for layer, pair in self._cache.items():
            missing = self._capacity - pair[0].shape[1]
            self._cache[layer] = tuple(F.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in pair)


def _neighbours(numbered: tuple[int, Piece]) -> tuple[int, int]:
    """The same for pieces that follow each other in a forward and in the cache, and see as many buckets of it."""
    number, piece = numbered
    return piece.row - number, -(-piece.end // _BUCKET)


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
    count = len(packing.places)
    for cache, new in ((keys, key), (values, value)):
        cache.flatten(0, 1).index_copy_(0, packing.places, new[0, :, :count].transpose(0, 1))
    out = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
    for first, piece, mask in packing.pieces:
        span = slice(first, first + len(piece.tokens))
        seen = (cache[piece.row, None, : piece.end].transpose(1, 2) for cache in (keys, values))
        found = F.scaled_dot_product_attention(query[:, :, span], *seen, mask, scale=scaling, enable_gqa=True)
        out[span] = found[0].transpose(0, 1)
    for first, row, mask in packing.runs:
        span, rows = slice(first, first + len(mask)), slice(row, row + len(mask))
        seen = (cache[rows, : mask.shape[3]].transpose(1, 2) for cache in (keys, values))
        # the queries that share a head of keys are as good as so many tokens
        grouped = query[0, :, span].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        out[span] = F.scaled_dot_product_attention(grouped, *seen, mask, scale=scaling).flatten(1, 2)
    return out[None], None


def _register() -> None:
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise LorakernError("model: cannot import transformers; run `pip install 'lorakern[transformers]'`") from error
    AttentionInterface.register(_NAME, _attend)
