"""The CUDA backend by itself against the reference on the same device; test_gpu.py has what holds for any backend.

LORAKERN_EMULATED_CUDA=1 runs it on CPU tensors and the emulator of native/cuda, as test_cuda_emulated.py does. What
needs no device is at the end.
"""

import os
import types
from unittest.mock import Mock

import pytest
import torch

import lorakern as lk
from lorakern.backends import cuda, reference
from lorakern.errors import LorakernError

EMULATED = os.environ.get("LORAKERN_EMULATED_CUDA") == "1"
DEVICE = "cpu" if EMULATED else "cuda"
DTYPES = [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
# A module that is missing where there is a device fails these tests instead of skipping them.
gpu = pytest.mark.usefixtures("emulated_cuda") if EMULATED else pytest.mark.gpu


def make_case(tokens, d_in, d_outs, slots, r_max, dtype, *, choices=1, absent=(), popularity="uniform", seed=0):
    """Random arguments of bgmv, NaN beyond the ranks. The first pair has slot 0, a quarter of the others none."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    A = [normal(slots, r_max, d_in) for _ in d_outs]
    B = [normal(slots, d_out, r_max) for d_out in d_outs]
    ranks = torch.randint(0, r_max + 1, (slots,), generator=random, dtype=torch.int32)
    ranks[0] = r_max
    if "ranks" not in absent:
        for slot, rank in enumerate(ranks.tolist()):
            for a, b in zip(A, B, strict=True):
                a[slot, rank:], b[slot, :, rank:] = torch.nan, torch.nan
    pairs = torch.arange(tokens * choices).view(tokens, choices)
    indices = {
        "uniform": torch.randint(0, slots, (tokens, choices), generator=random),
        "identical": torch.zeros_like(pairs),
        "distinct": pairs % slots,
        "skewed": torch.where(pairs % 5 == 4, pairs % slots, 0),
    }[popularity]
    outside = torch.tensor([-1, slots, -7, 2**31 - 1])[pairs % 4]
    indices = torch.where(torch.rand(tokens, choices, generator=random) < 0.25, outside, indices)
    indices[0, 0] = 0
    case = {
        "x": normal(tokens, d_in).to(dtype),
        "A": [a.to(dtype) for a in A],
        "B": [b.to(dtype) for b in B],
        "indices": indices.int(),
        "scale": normal(slots),
        "ranks": ranks,
        "gates": normal(tokens, choices),
    }
    return moved({name: None if name in absent else value for name, value in case.items()}, DEVICE)


def moved(case, device):
    def move(value):
        return [v.to(device) for v in value] if isinstance(value, list) else None if value is None else value.to(device)

    return {name: move(value) for name, value in case.items()}


def make_y(case, y_offset=0, after=0):
    width = y_offset + sum(b.shape[1] for b in case["B"]) + after
    random = torch.Generator().manual_seed(7)
    return torch.randn(case["x"].shape[0], width, generator=random).to(case["x"].dtype).to(DEVICE)


def run(case, y, y_offset=0, accumulate=True):
    cuda.bgmv(y, **case, order=None, starts=None, y_offset=y_offset, accumulate=accumulate)
    return y


def expected(case, y, y_offset=0, accumulate=True):
    """The same in float64, not rounded."""
    wide = {**case, "x": case["x"].double(), "A": [a.double() for a in case["A"]], "B": [b.double() for b in case["B"]]}
    y = y.double()
    reference.bgmv(y, **wide, order=None, starts=None, y_offset=y_offset, accumulate=accumulate)
    return y


def served(case):
    return reference._has_adapter(case["indices"], case["A"][0].shape[0], case["ranks"])


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same_bits(left, right):
    return torch.equal(bits(left), bits(right))


def ratio(got, want):
    """RMS of the difference over RMS of what is wanted."""
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def check(case, tolerance, y_offset=0, accumulate=True, after=0):
    """Right where the contract says that y is written, and untouched everywhere else."""
    rows, columns = served(case), sum(b.shape[1] for b in case["B"])
    y = make_y(case, y_offset, after)
    y[~rows] = torch.nan
    y[~rows, ::2] = -0.0  # adding 0 would change it
    if not accumulate:
        y[rows, y_offset : y_offset + columns] = torch.nan
    before, want = y.clone(), expected(case, y, y_offset, accumulate)
    run(case, y, y_offset, accumulate)
    written = torch.zeros_like(y, dtype=torch.bool)
    written[rows, y_offset : y_offset + columns] = True
    assert torch.equal(bits(y)[~written], bits(before)[~written])
    assert ratio(y[written], want[written]) < tolerance  # NaN, too, fails here


@gpu
def test_usable():
    assert cuda.missing() is None


@gpu
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_outs", "slots", "r_max", "choices"),
    [
        (1, 64, (64,), 1, 8, 1),
        (5, 63, (5,), 3, 5, 2),
        (63, 1000, (1000, 63, 1), 8, 24, 1),
        (9, 257, (129,), 4, 512, 4),
        (33, 136, (136, 8, 8, 1, 16, 8, 24, 8, 40, 5), 5, 16, 2),  # more slices than one launch takes
        (2, 1, (1,), 2, 1, 1),
        (64, 4096, (4096,), 64, 16, 1),
    ],
)
def test_matches_reference(tokens, d_in, d_outs, slots, r_max, choices, dtype, tolerance, accumulate):
    check(make_case(tokens, d_in, d_outs, slots, r_max, dtype, choices=choices), tolerance, 3, accumulate, after=2)


@gpu
@pytest.mark.parametrize("popularity", ["uniform", "identical", "distinct", "skewed"])
@pytest.mark.parametrize("choices", [1, 2, 4])
@pytest.mark.parametrize("absent", [("ranks", "scale", "gates"), ("ranks", "scale"), ("gates",), ()])
def test_popularity_choices_and_optional_arguments(popularity, choices, absent):
    case = make_case(40, 256, (128, 64), 6, 16, torch.float32, choices=choices, absent=absent, popularity=popularity)
    check(case, 1e-6)


@gpu
def test_wide_integers_and_strided_vectors():
    case = make_case(20, 128, (96,), 5, 16, torch.float32, choices=3)
    want = run(case, make_y(case))
    tokens, slots = case["x"].shape[0], 5
    gates, scale = torch.zeros(3, tokens, 2, device=DEVICE), torch.zeros(slots, 3, device=DEVICE)
    gates[:, :, 1], scale[:, 2] = case["gates"].T, case["scale"]
    indices = case["indices"].long().repeat_interleave(2, dim=1)[:, ::2]
    ranks = case["ranks"].long().repeat_interleave(2)[::2]
    strided = {**case, "gates": gates[:, :, 1].T, "scale": scale[:, 2], "indices": indices, "ranks": ranks}
    assert same_bits(run(strided, make_y(case)), want)
    strided["indices"] = torch.where(indices < 0, 2**32, indices)  # slot 0 if it were cut to 32 bits
    assert same_bits(run(strided, make_y(case)), want)


@gpu
def test_ranks_out_of_range_are_clamped():
    case = make_case(16, 64, (64,), 4, 8, torch.bfloat16, absent=("ranks",))
    want = run({**case, "ranks": torch.tensor([8, 0, 8, 3], device=DEVICE)}, make_y(case))
    assert same_bits(run({**case, "ranks": torch.tensor([9, -5, 2**40, 3], device=DEVICE)}, make_y(case)), want)


@gpu
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_outs", "r_max"),
    [
        (17, 200, (64, 72), 24),
        (3, 2072, (1032,), 16),
        (40, 520, (72, 8), 64),
        (200, 520, (8, 136), 64),
        (150, 72, (40,), 8),
    ],
)
def test_alignment_does_not_change_a_bit(tokens, d_in, d_outs, r_max, accumulate, dtype):
    """Nor does the kernel: what does not lie in chunks of 16 bytes has one of its own."""
    case = make_case(tokens, d_in, d_outs, 4, r_max, dtype)
    want = run(case, make_y(case), 0, accumulate)

    def shifted(w):
        roomy = torch.full((*w.shape[:-1], w.shape[-1] + 3), torch.nan, dtype=dtype, device=DEVICE)
        roomy[..., 1:-2] = w
        return roomy[..., 1:-2]

    crooked = {name: [shifted(w) for w in case[name]] for name in ("A", "B")}
    got = run({**case, "x": shifted(case["x"]), **crooked}, shifted(make_y(case)), 0, accumulate)
    rows = slice(None) if accumulate else served(case)
    assert same_bits(got[rows], want[rows])


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r_max", [16, 32, 64])
def test_few_tokens_have_the_bits_of_many(r_max, dtype):
    case = make_case(1100, 264, (72, 136), 3, r_max, dtype)
    want = run(case, make_y(case))
    for start, stop in ((0, 1), (5, 14), (100, 228), (100, 229), (7, 600)):
        rows = {name: case[name][start:stop] for name in ("x", "indices", "gates")}
        assert same_bits(run({**case, **rows}, make_y(case)[start:stop].clone()), want[start:stop])


@gpu
@pytest.mark.parametrize("accumulate", [True, False])
def test_columns_of_x_and_y_that_are_not_side_by_side(accumulate):
    case = make_case(12, 72, (40, 24), 3, 8, torch.bfloat16)
    want = run(case, make_y(case, 5, after=3), 5, accumulate)
    y = make_y(case, 5, after=3).T.contiguous().T
    x = case["x"].repeat_interleave(2, dim=1)[:, ::2]
    assert same_bits(run({**case, "x": x}, y, 5, accumulate), want)


@gpu
def test_stride_zero_weights():
    case = make_case(12, 72, (40,), 1, 8, torch.float16, absent=("ranks", "scale"))
    shared = {**case, "A": [case["A"][0].expand(6, -1, -1)], "B": [case["B"][0].expand(6, -1, -1)]}
    shared["indices"] = torch.arange(12, device=DEVICE)[:, None] % 7 - 1
    check(shared, 1e-3)


@gpu
def test_nothing_to_do():
    case = make_case(4, 32, (16,), 2, 8, torch.float32)
    none = {**case, **{name: case[name][:0] for name in ("x", "indices", "gates")}}
    assert run(none, make_y(none)).shape == (0, 16)
    for empty in (
        {**case, "indices": torch.full_like(case["indices"], -1)},
        {**case, "ranks": torch.zeros_like(case["ranks"])},
        {**case, "A": [case["A"][0][:, :0]], "B": [case["B"][0][:, :, :0]], "ranks": None},
        {**case, "A": [case["A"][0][:0]], "B": [case["B"][0][:0]], "ranks": None, "scale": None},
    ):
        assert same_bits(run(empty, make_y(case), accumulate=False), make_y(case))


@gpu
def test_float64_is_refused():
    case = make_case(4, 32, (16,), 2, 8, torch.float64)
    with pytest.raises(LorakernError, match="float64"):
        run(case, make_y(case))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    case = make_case(6, 64, (48,), 2, 8, torch.bfloat16, absent=("ranks",))
    gap = 2**31 + 8
    far = {**case, "A": [], "B": []}
    for name in ("A", "B"):
        w = case[name][0]
        room = torch.empty(gap + w.numel(), dtype=w.dtype, device=DEVICE)
        far[name] = [room.as_strided(w.shape, (gap, w.shape[2], 1)).copy_(w)]
    assert same_bits(run(far, make_y(case)), run(case, make_y(case)))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_the_tensors_decides():
    case = make_case(8, 64, (64,), 4, 8, torch.bfloat16)
    want = run(case, make_y(case))
    assert torch.equal(run(moved(case, "cuda:1"), make_y(case).to("cuda:1")).cpu(), want.cpu())
    assert torch.cuda.current_device() == 0


@pytest.fixture
def fresh_missing():
    cuda.missing.cache_clear()
    yield
    cuda.missing.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ModuleNotFoundError("no"), "the CUDA module was not built"), (ImportError("bad ELF"), "does not load: bad ELF")],
)
def test_missing_says_that_the_module_is_absent(monkeypatch, fresh_missing, error, reason):
    monkeypatch.setattr(cuda, "_module", Mock(side_effect=error))
    assert reason in cuda.missing()
    with pytest.raises(LorakernError, match=reason), lk.use_backend("cuda"):
        pass


@pytest.mark.parametrize(
    ("devices", "problem", "reason"),
    [
        ([], None, "torch sees no CUDA device"),
        ([(9, 0)], "driver too old", "the CUDA module does not run here: driver too old"),
        ([(7, 0), (7, 5)], None, "device sm_75 is older than sm_80"),
        ([(7, 5), (9, 0)], None, None),
    ],
)
def test_missing_says_what_is_wrong_with_the_devices(monkeypatch, fresh_missing, devices, problem, reason):
    monkeypatch.setattr(cuda, "_module", lambda: types.SimpleNamespace(problem=lambda: problem))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device])
    assert cuda.missing() == reason
