"""B with every slot packed at its true rank gives the bits of the padded B, and is refused where it cannot be read."""

import pytest
import torch

import lorakern as lk
from lorakern.ops._checks import check_packed

SLOTS, R_MAX, D_IN = 5, 24, 70
RANKS = torch.tensor([24, 5, 0, 16, 1])
SIZES = [(1, 33), (5, 64), (63, 100), (300, 1)]
by_size = pytest.mark.parametrize("tokens, d_out", SIZES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def pack(B, ranks):
    """NaN wherever a kernel has nothing to look for."""
    packed = torch.full_like(B, torch.nan)
    for slot, rank in enumerate(ranks.tolist()):
        packed[slot].view(-1)[: B.shape[1] * rank] = B[slot, :, :rank].flatten()
    return packed


def make(tokens, d_out, dtype, choices=1):
    g = torch.Generator().manual_seed(tokens + d_out)
    x, y = torch.randn(tokens, D_IN, generator=g).to(dtype), torch.randn(tokens, 2 * d_out, generator=g).to(dtype)
    A = [torch.randn(SLOTS, R_MAX, D_IN, generator=g).to(dtype) / 8 for _ in range(2)]
    B = [torch.randn(SLOTS, d_out, R_MAX, generator=g).to(dtype) / 8 for _ in range(2)]
    return y, x, A, B, torch.randint(-1, SLOTS, (tokens, choices), generator=g)


@by_dtype
@by_size
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_bgmv_has_the_bits_of_the_padded_form(tokens, d_out, dtype, choices, backend):
    y, x, A, B, indices = make(tokens, d_out, dtype, choices)
    packed = [pack(b, RANKS) for b in B]

    def both():
        want = lk.bgmv(y.clone(), x, A, B, indices, ranks=RANKS, scale=0.5)
        return want, lk.bgmv(y.clone(), x, A, packed, indices, ranks=RANKS, scale=0.5, packed=True)

    if backend is None:
        want, got = both()
    else:
        with lk.use_backend(backend):
            want, got = both()
    assert torch.equal(want, got)


@by_dtype
@by_size
def test_expand_has_the_bits_of_the_padded_form(tokens, d_out, dtype):
    y, x, A, B, indices = make(tokens, d_out, dtype)
    packed = [pack(b, RANKS) for b in B]
    h = lk.shrink(x, A, indices, ranks=RANKS)
    want = lk.expand(y.clone(), h, B, indices, ranks=RANKS)
    assert torch.equal(want, lk.expand(y.clone(), h, packed, indices, ranks=RANKS, packed=True))
    with lk.use_backend("cpu"):
        assert torch.equal(want, lk.expand(y.clone(), h, packed, indices, ranks=RANKS, packed=True))


def test_a_gradient_follows_packed_weights():
    y, x, A, B, indices = make(5, 64, torch.float32)
    packed = [pack(b, RANKS).nan_to_num().requires_grad_() for b in B]
    padded = [b.clone().requires_grad_() for b in B]
    lk.bgmv(y.clone(), x, A, packed, indices, ranks=RANKS, packed=True).square().sum().backward()
    lk.bgmv(y.clone(), x, A, padded, indices, ranks=RANKS).square().sum().backward()
    for ours, theirs in zip(packed, padded, strict=True):
        assert torch.equal(ours.grad.isfinite(), torch.ones_like(ours.grad, dtype=torch.bool))
        assert torch.equal(ours.grad, pack(theirs.grad, RANKS).nan_to_num())


def test_packed_weights_are_refused_without_ranks_or_with_other_strides():
    y, x, A, B, indices = make(5, 64, torch.float32)
    before = y.clone()
    wide = [torch.zeros(SLOTS, 64, R_MAX + 1)[:, :, :R_MAX] for _ in B]
    with pytest.raises(lk.LorakernError, match="ranks must be given where B is packed"):
        lk.bgmv(y, x, A, B, indices, packed=True)
    with pytest.raises(lk.LorakernError, match="B must have contiguous slots"):
        lk.bgmv(y, x, A, wide, indices, ranks=RANKS, packed=True)
    assert torch.equal(y, before)


def test_a_gpu_is_told_that_it_cannot_read_packed_weights():
    meta = [torch.empty(SLOTS, 64, R_MAX, device="meta")]
    with pytest.raises(lk.LorakernError, match="only the CPU kernels"):
        check_packed("bgmv", meta, RANKS)
