"""lorakern.compat: the ops of vLLM and Punica against vLLM's own where its files are, and against plain formulas."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from problems import POPULARITIES, error_ratio, route

import lorakern as lk
from lorakern.compat import punica
from lorakern.compat.vllm import torch_ops, triton_ops

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
by_dtype = pytest.mark.parametrize("dtype, tolerance", DTYPES.items(), ids=lambda value: str(value).split(".")[-1])


def vllm_file(name):
    """A file of an installed vLLM, found without importing vLLM, which needs far more than these files do."""
    spec = importlib.util.find_spec("vllm")
    path = spec and spec.origin and Path(spec.origin).parent / "lora" / "ops" / name
    if not path or not path.is_file():
        pytest.skip(f"no vLLM with lora/ops/{name} is installed")
    return path


def vllm_module(name):
    spec = importlib.util.spec_from_file_location(f"vllm_{Path(name).stem}", vllm_file(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def slots_of(tokens, slots, popularity="uniform", absent=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    indices = route(popularity, (tokens, 1), slots, g)[:, 0]
    indices[torch.rand(tokens, generator=g) < absent] = -1
    return indices


def product(x, weight, indices):
    """weight[indices[t]] @ x[t] in float64, zero for -1."""
    weight = weight.squeeze(1) if weight.dim() == 4 else weight
    rows = torch.einsum("tri,ti->tr", weight.double()[indices.clamp_min(0)], x.double())
    return torch.where(indices[:, None] >= 0, rows, 0)


def same_parameters(ours, theirs):
    ours, theirs = (inspect.signature(f).parameters.values() for f in (ours, theirs))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


# vLLM's torch_ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", torch_ops.__all__)
def test_torch_ops_have_the_signatures_of_vllm(name):
    same_parameters(getattr(torch_ops, name), getattr(vllm_module("torch_ops/lora_ops.py"), name))


@by_dtype
@pytest.mark.parametrize(
    "tokens, slots, d_in, d_out, rank", [(1, 1, 8, 5, 1), (5, 3, 63, 100, 16), (33, 8, 256, 65, 5)]
)
@pytest.mark.parametrize("four", [False, True])
def test_torch_ops_equal_those_of_vllm(tokens, slots, d_in, d_out, rank, four, dtype, tolerance):
    theirs = vllm_module("torch_ops/lora_ops.py")
    shape = (slots, 1) if four else (slots,)
    x, A, B = (
        randn(tokens, d_in, dtype=dtype),
        randn(*shape, rank, d_in, dtype=dtype),
        randn(*shape, d_out, rank, dtype=dtype),
    )
    lengths = torch.tensor([tokens // 2, 0, tokens - tokens // 2])
    per_sequence = slots_of(3, slots, absent=0, seed=tokens)
    indices = slots_of(tokens, slots, absent=0)
    segments = (lengths.cumsum(0) - lengths, lengths, per_sequence, 3, int(lengths.max()), tokens)
    for h_dtype, wide in ((torch.float32, rank), (torch.float32, rank + 3), (dtype, rank)):
        for kind, where in (("bgmv", (indices,)), ("sgmv", segments)):
            outputs = []
            for ops in (torch_ops, theirs):
                h = randn(tokens, wide, dtype=h_dtype, seed=1)
                getattr(ops, f"{kind}_shrink")(x, A, h, *where, 0.5)
                y = randn(tokens, d_out + 4, dtype=dtype, seed=2)
                narrow, plain, added = y[:, : d_out - 2].clone(), y.clone(), y.clone()
                rows = h[:, :rank]
                getattr(ops, f"{kind}_expand")(rows, B, plain, *where, False)
                getattr(ops, f"{kind}_expand")(rows, B, added, *where, add_inputs=True)
                getattr(ops, f"{kind}_expand")(rows, B, narrow, *where, True)
                getattr(ops, f"{kind}_expand_slice")(rows, B, y, *where, 3, d_out, False)
                getattr(ops, f"{kind}_expand_slice")(rows, B, y, *where, 2, d_out, add_inputs=True)
                outputs.append((h, plain, added, narrow, y))
            for ours, vllms in zip(*outputs, strict=True):
                assert error_ratio(ours, vllms) < tolerance


def test_torch_ops_take_one_row_for_all_and_more_rows_than_the_output():
    theirs = vllm_module("torch_ops/lora_ops.py")
    A, B = randn(3, 4, 16), randn(3, 8, 4)
    for rows, written, ops in ((1, 6, "shrink"), (1, 6, "expand"), (6, 4, "expand")):
        indices, weights = slots_of(rows, 3, absent=0), A if ops == "shrink" else B
        results = []
        for module in (torch_ops, theirs):
            results.append(torch.ones(written, weights.shape[1]))
            getattr(module, f"bgmv_{ops}")(randn(rows, weights.shape[2]), weights, results[-1], indices)
        assert error_ratio(*results) < 1e-6


@by_dtype
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_torch_ops_leave_rows_without_an_adapter(popularity, dtype, tolerance):
    x, A, B = randn(40, 64, dtype=dtype), randn(5, 8, 64, dtype=dtype), randn(5, 48, 8, dtype=dtype)
    indices = slots_of(40, 5, popularity)
    absent, x[indices < 0] = indices < 0, float("nan")
    h, y = torch.full((40, 8), float("nan")), randn(40, 48, dtype=dtype, seed=5)
    before = y.clone()
    torch_ops.bgmv_shrink(x, A, h, indices, 2.0)
    exact = product(x.nan_to_num(), A, indices) * 2
    assert h[absent].isnan().all() and error_ratio(h[~absent], exact[~absent]) < 1e-5
    for add in (True, False):
        torch_ops.bgmv_expand(h, B, y, indices, add)
        assert y[absent].equal(before[absent])
        delta = product(h.nan_to_num(), B, indices) + (before.double() if add else 0)
        assert error_ratio(y[~absent], delta[~absent]) < tolerance


def test_torch_ops_mix_dtypes_as_vllm_does():
    x, A, h = randn(9, 32), randn(2, 4, 32, dtype=torch.bfloat16), torch.empty(9, 4)
    indices = slots_of(9, 2, absent=0)
    torch_ops.bgmv_shrink(x, A, h, indices)
    assert error_ratio(h, product(x, A, indices)) < 1e-6
    y = torch.empty(9, 10)
    torch_ops.bgmv_expand(h, randn(2, 10, 4, dtype=torch.bfloat16), y, indices, False)
    assert error_ratio(y, product(h, randn(2, 10, 4, dtype=torch.bfloat16), indices)) < 1e-6


# vLLM's triton_ops --------------------------------------------------------------------------------------------------


def parameters_in(path, function):
    """(name, default) of the parameters of a function, read without importing its file."""
    tree = ast.parse(path.read_text())
    found = next(node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    defaults = [None] * (len(found.args) - len(found.defaults)) + [d.value for d in found.defaults]
    return [(argument.arg, default) for argument, default in zip(found.args, defaults, strict=True)]


@pytest.mark.parametrize("name", ["lora_shrink", "lora_expand"])
def test_triton_ops_have_the_signatures_of_vllm(name):
    ours = inspect.signature(getattr(triton_ops, name)).parameters.values()
    ours = [(p.name, None if p.default is p.empty else p.default) for p in ours]
    assert ours == parameters_in(vllm_file(f"triton_ops/{name}_op.py"), f"_{name}")


def test_metadata_has_the_interface_of_vllm():
    ours, theirs = triton_ops.LoRAKernelMeta, vllm_module("triton_ops/lora_kernel_metadata.py").LoRAKernelMeta
    assert list(ours.__dataclass_fields__) == list(theirs.__dataclass_fields__)
    for method in ("make", "prepare_tensors", "meta_args"):
        same_parameters(getattr(ours, method), getattr(theirs, method))


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("captured", [None, [1, 2, 4, 8]])
def test_metadata_equals_that_of_vllm(popularity, captured):
    theirs = vllm_module("triton_ops/lora_kernel_metadata.py").LoRAKernelMeta.make(6, 50, "cpu", captured)
    ours = triton_ops.LoRAKernelMeta.make(6, 50, "cpu", captured)
    for tokens, absent in ((1, 0), (50, 0.3), (17, 1), (20, 0), (33, 0.9)):
        mapping = slots_of(tokens, 6, popularity, absent, seed=tokens)
        for meta in (ours, theirs):
            meta.prepare_tensors(mapping)
        nobody = bool((mapping < 0).all())
        for specialize in (True, False):
            left, right = (meta.meta_args(tokens, specialize) for meta in (ours, theirs))
            # nothing but the flag is read where there is no adapter
            for a, b in zip(left[2 if nobody else 0 :], right[2 if nobody else 0 :], strict=True):
                assert a.dtype == b.dtype and a.equal(b)


def metadata(mapping, slots):
    meta = triton_ops.LoRAKernelMeta.make(slots, len(mapping) + 3, "cpu")
    meta.prepare_tensors(mapping)
    return meta.meta_args(len(mapping), False)


@by_dtype
@pytest.mark.parametrize("h_dtype", list(DTYPES))
@pytest.mark.parametrize("d_outs", [(24,), (37, 64, 5)])
@pytest.mark.parametrize("four", [False, True])
def test_triton_ops_equal_the_formula(d_outs, four, h_dtype, dtype, tolerance):
    tokens, slots, d_in, rank = 30, 4, 129, 6
    shape = (slots, 1) if four else (slots,)
    x, mapping = randn(tokens, d_in, dtype=dtype), slots_of(tokens, slots).int()
    A = [randn(*shape, rank, d_in, dtype=dtype, seed=s) for s in range(len(d_outs))]
    B = [randn(*shape, d_out, rank, dtype=dtype, seed=s) for s, d_out in enumerate(d_outs)]
    meta, absent = metadata(mapping, slots), mapping < 0
    h = torch.full((len(d_outs), tokens, rank), float("nan"), dtype=h_dtype)
    triton_ops.lora_shrink(x, A, h, *meta, 0.5)
    exact = torch.stack([product(x, a, mapping) / 2 for a in A])
    assert h[:, absent].eq(0).all() and error_ratio(h, exact) < max(DTYPES[h_dtype], 1e-5)

    for add in (True, False):
        y = randn(tokens + 2, sum(d_outs) + 7, dtype=dtype)
        before = y.clone()
        triton_ops.lora_expand(h, B, y, *meta, offset_start=3, add_inputs=add)
        delta = torch.cat([product(h[s], b, mapping) for s, b in enumerate(B)], 1)
        inside = (slice(tokens), slice(3, 3 + sum(d_outs)))
        exact = before.double()
        exact[inside] = torch.where(absent[:, None], exact[inside], delta + (exact[inside] if add else 0))
        assert error_ratio(y, exact) < tolerance
        exact[inside][~absent] = y[inside][~absent].double()
        assert y.double().equal(exact), "something beside the rows and columns to write has changed"


def test_triton_ops_honour_strides():
    x, mapping = randn(20, 64), slots_of(20, 3).int()
    A, B = randn(1, 1, 4, 32).expand(3, 1, 4, 32), randn(1, 16, 4).expand(3, 16, 4)
    h, y = torch.empty(1, 20, 4), randn(20, 40)[:, ::2]
    before, meta = y.clone(), metadata(mapping, 3)
    triton_ops.lora_shrink(x[:, ::2], (A,), h, *meta, 1.0)
    triton_ops.lora_expand(h.mT.contiguous().mT, (B,), y, *meta, 2, True)
    exact = before.double()
    exact[:, 2:18] += product(product(x[:, ::2], A, mapping), B, mapping)
    assert error_ratio(y, exact) < 1e-5


def test_triton_ops_do_nothing_where_no_token_has_an_adapter():
    meta = metadata(torch.full((5,), -1), 2)
    h, y = torch.full((1, 5, 4), 7.0), torch.full((5, 6), 7.0)
    triton_ops.lora_shrink(randn(5, 8), [randn(2, 4, 8)], h, *meta, 1.0)
    triton_ops.lora_expand(h, [randn(2, 6, 4)], y, *meta)
    assert h.eq(7).all() and y.eq(7).all()


def test_triton_ops_compile_whole_and_read_the_metadata_at_run_time():
    def layer(x, A, B, y, meta):
        h = x.new_empty(1, x.shape[0], 4)
        triton_ops.lora_shrink(x, [A], h, *meta, 1.0)
        triton_ops.lora_expand(h, [B], y, *meta, 0, True)
        return y

    x, A, B = randn(5, 8), randn(2, 4, 8), randn(2, 6, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mapping in (torch.tensor([0, -1, 1, 1, 0]), torch.full((5,), -1), torch.tensor([1, 1, 1, -1, 0])):
        y = compiled(x, A, B, torch.zeros(5, 6), metadata(mapping, 2))
        assert error_ratio(y + 1, product(product(x, A, mapping), B, mapping) + 1) < 1e-6


def run_everything(place, x, A, B, mapping):
    """All ops once, on a device; what they wrote."""
    meta = triton_ops.LoRAKernelMeta.make(len(A), 64, place)
    x, A, B, mapping = (tensor.to(place) for tensor in (x, A, B, mapping))
    tokens, rank, d_out = len(x), A.shape[1], B.shape[1]
    lengths = torch.full((tokens,), 1, device=place)
    routing = (lengths, lengths, mapping, tokens, 1, tokens)
    starts = torch.arange(0, tokens + 1, tokens // len(A), device=place, dtype=torch.int32)[: len(A) + 1]
    h, y = x.new_zeros(6, tokens, rank), x.new_zeros(6, tokens, d_out)

    def run():
        meta.prepare_tensors(mapping)
        arguments = meta.meta_args(tokens, True)
        triton_ops.lora_shrink(x, [A], h[:1], *arguments, 0.5)
        triton_ops.lora_expand(h[:1], [B], y[0], *arguments)
        torch_ops.bgmv_shrink(x, A, h[1], mapping, 0.5)
        torch_ops.bgmv_expand(h[1], B, y[1], mapping)
        torch_ops.sgmv_shrink(x, A, h[2], *routing, 0.5)
        torch_ops.sgmv_expand_slice(h[2], B, y[2], *routing, 0, d_out)
        punica.ops.bgmv(h[3], x, A[:, None], mapping, 0, 0.5)
        punica.ops.bgmv(y[3], h[3], B[:, None], mapping, 0, 1.0)
        punica.ops.add_lora_bgmv(y[4], x, A[:, None], B[:, None], mapping, 0, 0.5)
        weights = ([a[None] for a in A], [b[None].mT for b in B])
        punica.ops.add_lora_sgmv_custom_cutlass(y[5], x, *weights, starts, 0, rank)

    return run, y


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_waits_for_a_gpu(place):
    x, A, B, mapping = randn(24, 64), randn(4, 8, 64), randn(4, 96, 8), slots_of(24, 4)
    run, y = run_everything(place, x, A, B, mapping)
    run()
    y.zero_()
    if place == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        # the halves of Punica's bgmv accumulate in h as well: the second run starts from what the first left there
        run()
    finally:
        if place == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    exact = product(product(x, A, mapping), B, mapping) / 2
    in_runs = product(product(x, A, torch.arange(4).repeat_interleave(6)), B, torch.arange(4).repeat_interleave(6))
    for i, wanted in enumerate((exact, exact, exact, 2 * exact, exact, in_runs)):
        assert error_ratio(y[i].cpu(), wanted) < 1e-5, i


def test_no_tokens():
    meta = triton_ops.LoRAKernelMeta.make(3, 8, "cpu")
    nothing, A, B = torch.zeros(0, dtype=torch.long), randn(3, 2, 8), randn(3, 6, 2)
    meta.prepare_tensors(nothing)
    triton_ops.lora_shrink(randn(0, 8), [A], randn(1, 0, 2), *meta.meta_args(0, True), 1.0)
    triton_ops.lora_expand(randn(1, 0, 2), [B], randn(0, 6), *meta.meta_args(0, True))
    torch_ops.bgmv_shrink(randn(0, 8), A, randn(0, 2), nothing)
    torch_ops.sgmv_expand(randn(0, 2), B, randn(0, 6), nothing, nothing, nothing, 0, 0, 0)
    punica.ops.bgmv(randn(0, 2), randn(0, 8), A[:, None], nothing, 0, 1.0)


def test_weights_that_want_gradients_are_only_read():
    A, B = torch.nn.Parameter(randn(3, 2, 8)), torch.nn.Parameter(randn(3, 6, 2))
    x, mapping, h, y = randn(4, 8).requires_grad_(), slots_of(4, 3), torch.zeros(4, 2), torch.zeros(4, 6)
    torch_ops.bgmv_shrink(x, A, h, mapping)
    torch_ops.bgmv_expand(h, B, y, mapping)
    triton_ops.lora_expand(h[None], [B], y, *metadata(mapping, 3), 0, True)
    punica.ops.bgmv(y, h, B[:, None], mapping, 0, 1.0)
    assert not y.requires_grad and error_ratio(y, 3 * product(product(x, A, mapping), B, mapping)) < 1e-5


# Punica -------------------------------------------------------------------------------------------------------------

PUNICA = {
    "bgmv": "y x w_T_all indicies layer_idx scale",
    "add_lora_bgmv": "y x wa_T_all wb_T_all indicies layer_idx scale",
    "sgmv": "y x w_ptr s layer_idx",
    "sgmv_cutlass": "y x w_ptr s layer_idx",
    "add_lora_sgmv_cutlass": "y x wa_ptr wb_ptr s layer_idx lora_rank",
    "add_lora_sgmv_custom_cutlass": "y x wa_ptr wb_ptr s layer_idx lora_rank",
}


def test_punica_signatures():
    found = {name: " ".join(inspect.signature(getattr(punica.ops, name)).parameters) for name in punica.ops.__all__}
    assert found == PUNICA


@by_dtype
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("d_in, d_out, rank", [(256, 300, 8), (63, 200, 16), (129, 129, 5)])
def test_punica_bgmv(d_in, d_out, rank, popularity, dtype, tolerance):
    tokens, slots, layers = 32, 4, 3
    wa = randn(slots, layers, rank, d_in, dtype=dtype)
    wb = randn(slots, layers, d_out, rank, dtype=dtype)
    square = randn(slots, layers, d_out, d_in, dtype=dtype)
    x, indices = randn(tokens, d_in, dtype=dtype), slots_of(tokens, slots, popularity, absent=0.2)
    for layer in range(layers):
        down, up, whole = (w[:, layer] for w in (wa, wb, square))
        h = randn(tokens, rank, dtype=dtype)
        for call, output, given, delta in (
            (punica.ops.bgmv, rank, (x, wa), product(x, down, indices)),
            (punica.ops.bgmv, d_out, (h, wb), product(h, up, indices)),
            (punica.ops.bgmv, d_out, (x, square), product(x, whole, indices)),
            (punica.ops.add_lora_bgmv, d_out, (x, wa, wb), product(product(x, down, indices), up, indices)),
        ):
            before = randn(tokens, output, dtype=dtype, seed=9)
            y = before.clone()
            assert call(y, *given, indices, layer, 0.123) is None
            assert error_ratio(y, before.double() + 0.123 * delta) < tolerance
            assert y[indices < 0].equal(before[indices < 0])


def segments(popularity, count):
    """(starts, the weights that each segment uses) of runs as long as the popularity makes them."""
    lengths = torch.bincount(route(popularity, (40, 1), count, torch.Generator().manual_seed(3))[:, 0], minlength=count)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


@by_dtype
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("stacked", [False, True])
def test_punica_sgmv(stacked, popularity, dtype, tolerance):
    count, layers, d_in, d_out, rank = 5, 2, 96, 200, 16
    s = segments(popularity, count)
    tokens, slots = int(s[-1]), torch.arange(count).repeat_interleave(s.diff())
    x, h = randn(tokens, d_in, dtype=dtype), randn(tokens, rank, dtype=dtype)
    wa = [randn(layers, rank, d_in, dtype=dtype, seed=i) for i in range(count)]
    wb = [randn(layers, d_out, rank, dtype=dtype, seed=i) for i in range(count)]
    rows_a, rows_b = [w.mT.contiguous() for w in wa], [w.mT.contiguous() for w in wb]
    given = torch.stack if stacked else list
    for layer in range(layers):
        a, b = (torch.stack([w[layer] for w in weights]) for weights in (wa, wb))
        lora = product(product(x, a, slots), b, slots)
        for call, output, arguments, delta in (
            (punica.ops.sgmv, rank, (x, given(wa), s, layer), product(x, a, slots)),
            (punica.ops.sgmv, d_out, (h, given(wb), s, layer), product(h, b, slots)),
            (punica.ops.sgmv_cutlass, rank, (x, given(rows_a), s, layer), product(x, a, slots)),
            (punica.ops.sgmv_cutlass, d_out, (h, given(rows_b), s, layer), product(h, b, slots)),
            (punica.ops.add_lora_sgmv_cutlass, d_out, (x, given(rows_a), given(rows_b), s, layer, rank), lora),
            (punica.ops.add_lora_sgmv_custom_cutlass, d_out, (x, given(wa), given(rows_b), s, layer, rank), lora),
        ):
            before = randn(tokens, output, dtype=dtype, seed=9)
            y = before.clone()
            call(y, *arguments)
            assert error_ratio(y, before.double() + delta) < tolerance


def test_punica_weights_that_segments_share():
    loras = [punica.utils.LoraWeight(2, 24, 40, 4, torch.float32, torch.device("cpu")) for _ in range(2)]
    for i, lora in enumerate(loras):
        lora.copy_from_tensor(randn(2, 4, 24, seed=i), randn(2, 40, 4, seed=i))
    for used in ([0, 0, 0], [1, 0, 1]):
        batch, s = punica.utils.BatchedLoraWeight([loras[i] for i in used]), torch.tensor([0, 3, 3, 8])
        x, y = randn(8, 24), torch.zeros(8, 40)
        punica.ops.add_lora_sgmv_custom_cutlass(y, x, batch.wa_ptr, batch.wb_ptr, s, 1, 4)
        rows = [loras[used[0]]] * 3 + [loras[used[2]]] * 5
        exact = torch.stack([x[t] @ lora.wa[1].T @ lora.wb[1] for t, lora in enumerate(rows)])
        assert error_ratio(y, exact) < 1e-5


# what is refused ----------------------------------------------------------------------------------------------------

X, Y, A, B = randn(4, 8), randn(4, 6), randn(3, 2, 8), randn(3, 6, 2)
H, FIRST = randn(4, 2), torch.zeros(4, dtype=torch.long)
SEQUENCES = (torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([0, 1]), 2, 3, 4)
ADDRESSES = torch.tensor([A.data_ptr()])
META = metadata(FIRST, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: torch_ops.bgmv_shrink(X, A[0], H, FIRST), "slots, rows, columns"),
        (lambda: torch_ops.bgmv_shrink(X, A, H[:, :1], FIRST), "2 columns"),
        (lambda: torch_ops.bgmv_shrink(X, A, H[:3], FIRST), "4 rows"),
        (lambda: torch_ops.bgmv_shrink(X, A, H, FIRST[:3]), "lora_indices_tensor"),
        (lambda: torch_ops.bgmv_shrink(X, A, H, FIRST + 3), "indices"),
        (lambda: torch_ops.bgmv_expand(X, B, Y, FIRST), "inputs"),
        (lambda: torch_ops.bgmv_expand_slice(H, B, Y, FIRST, 0, 5), "slice_size"),
        (lambda: torch_ops.bgmv_expand_slice(H, B, Y, FIRST, 1, 6), "columns"),
        (lambda: torch_ops.sgmv_shrink(X, A, H, *SEQUENCES, 1.0), "seg_starts"),
        (lambda: triton_ops.lora_shrink(X, [A], H, *META, 1.0), "output_tensor"),
        (lambda: triton_ops.lora_shrink(X[:3], [A], H[None, :3], *META, 1.0), "token_lora_mapping"),
        (lambda: triton_ops.lora_expand(H[None], [B, B], Y, *META), "slices|h must"),
        (lambda: triton_ops.lora_expand(H[None], [B], Y, *META, 1), "columns"),
        (lambda: triton_ops.lora_expand(H[None], [B[None]], Y, *META), "slots, 1"),
        (lambda: triton_ops.LoRAKernelMeta.make(3, 2, "cpu").prepare_tensors(FIRST), "at most 2"),
        (lambda: triton_ops.LoRAKernelMeta.make(3, 4, "cpu").prepare_tensors(FIRST + 3), "slots - 1 = 2"),
        (lambda: punica.ops.bgmv(Y, X, A[:, None], FIRST, 0, 1.0), "columns"),
        (lambda: punica.ops.bgmv(H, X, A[:, None], FIRST, 1, 1.0), "layer_idx"),
        (lambda: punica.ops.bgmv(H, X, A, FIRST, 0, 1.0), "layers"),
        (lambda: punica.ops.bgmv(H, X, A[:, None], FIRST[:, None].repeat(1, 2), 0, 1.0), "one slot"),
        (lambda: punica.ops.bgmv(H, X[:1], A[:, None], FIRST[:1], 0, 1.0), "rows of y"),
        (lambda: punica.ops.bgmv(Y, H, B[:, None].half(), FIRST, 0, 1.0), "dtype"),
        (lambda: punica.ops.add_lora_bgmv(Y, X, A[:, None], B[:, None, :, :1], FIRST, 0, 1.0), "h must"),
        (lambda: punica.ops.sgmv(H, X, ADDRESSES, torch.tensor([0, 4]), 0), "addresses"),
        (lambda: punica.ops.sgmv(H, X, A[:, None], torch.tensor([0, 4]), 0), "segments"),
        (lambda: punica.ops.sgmv(H, X, [A[:1], A[1:]], torch.tensor([0, 2, 4]), 0), "same shape"),
        (
            lambda: punica.ops.add_lora_sgmv_custom_cutlass(
                Y, X, A[:1][None], B[:1].mT[None], torch.tensor([0, 4]), 0, 4
            ),
            "lora_rank",
        ),
    ],
)
def test_refusals_write_nothing(call, message):
    h, y = H.clone(), Y.clone()
    with pytest.raises(lk.LorakernError, match=message):
        call()
    assert H.equal(h) and Y.equal(y)
