"""check_concat_sum: right merges pass in every dtype, wrong ones fail by name, one flipped bit is found."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakern as lk
from lorakern.backends import cpu
from lorakern.ops._fast import fast

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
EXPONENT = {torch.float16: (10, 5), torch.bfloat16: (7, 8), torch.float32: (23, 8)}  # first bit, how many
WEIGHTS = [0.5, 0.3, -0.7]


pytestmark = pytest.mark.usefixtures("one_thread")


def adapters_of(dtype, shapes, ranks=(4, 8, 3), seed=0):
    """An adapter for each rank, with a module for each (d_out, d_in)."""
    g = torch.Generator().manual_seed(seed)

    def factors(rank, d_out, d_in, scale):
        A, B = torch.randn(rank, d_in, generator=g) / 8, torch.randn(d_out, rank, generator=g)
        return lk.LoraFactors(A.to(dtype), B.to(dtype), scale)

    return [
        {f"layers.{m}": factors(rank, *shape, 0.5 + i) for m, shape in enumerate(shapes)}
        for i, rank in enumerate(ranks)
    ]


def concatenated(adapters, weights, dtype, scale=2.0):
    """The exact merge, with weights and scales folded into A and rounded to the dtype."""
    merged = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        held = [(w, *a[name]) for w, a in zip(weights, adapters, strict=True) if name in a]
        A = torch.cat([w * s / scale * a.double() for w, a, _, s in held]).to(dtype)
        merged[name] = lk.LoraFactors(A, torch.cat([b for _, _, b, _ in held], dim=1).to(dtype), scale)
    return merged


SHAPES = [(300, 200), (5, 63), (1000, 7), (64, 64)]


@pytest.mark.parametrize("merged_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_merge_passes(dtype, merged_dtype):
    adapters = adapters_of(dtype, SHAPES)
    report = lk.check_concat_sum(adapters, concatenated(adapters, WEIGHTS, merged_dtype), weights=WEIGHTS, probe=True)
    assert report.passed, str(report)
    assert set(report.modules) == {f"layers.{m}" for m in range(len(SHAPES))}
    for module in report.modules.values():
        assert 0 <= module.error <= module.bound < 20 * torch.finfo(merged_dtype).eps + 1e-12
        assert module.rows <= 1 and module.columns <= 1 and module.outliers == 0
        assert module.probe <= module.probe_bound < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_merge_by_singular_values_passes(dtype):
    adapters = adapters_of(torch.float32, SHAPES)
    sums = {n: [(*a[n][:2], w * a[n].scale) for w, a in zip(WEIGHTS, adapters, strict=True)] for n in adapters[0]}
    whole = {n: (t.A, t.B, 1.0) for n, t in lk.truncate(sums, None, dtype=dtype).items()}
    assert lk.check_concat_sum(adapters, whole, weights=WEIGHTS).passed
    cut = {n: (t.A, t.B, 1.0) for n, t in lk.truncate(sums, 2).items()}
    failed = lk.check_concat_sum(adapters, cut, weights=WEIGHTS)
    assert len(failed.failed) == len(SHAPES)
    errors = {n: lk.delta_distance([cut[n]], sums[n]) for n in cut}
    assert {n: m.error for n, m in failed.modules.items()} == pytest.approx(errors, rel=1e-6)
    assert lk.check_concat_sum(adapters, cut, weights=WEIGHTS, rtol=max(errors.values()) * 1.0001).passed
    assert not lk.check_concat_sum(adapters, cut, weights=WEIGHTS, rtol=max(errors.values()) * 0.9999).passed


def test_errors_near_the_tolerance_are_exact_and_others_are_estimated_well():
    adapters = adapters_of(torch.float64, [(300, 200)])
    merged = concatenated(adapters, WEIGHTS, torch.float64)
    sums = [(*a["layers.0"][:2], w * a["layers.0"].scale) for w, a in zip(WEIGHTS, adapters, strict=True)]
    merged["layers.0"].A.mul_(1 + 1e-6 * torch.randn(15, 200, generator=torch.Generator().manual_seed(1)).double())
    exact = lk.delta_distance([merged["layers.0"]], sums)
    for rtol, is_exact, within in ((exact * 1.001, True, 1e-4), (exact * 100, False, 0.5)):
        (module,) = lk.check_concat_sum(adapters, merged, weights=WEIGHTS, rtol=rtol).modules.values()
        assert module.passed and module.exact == is_exact
        assert module.error == pytest.approx(exact, rel=within)


@pytest.mark.parametrize("isa", cpu._cpu.usable_isas())
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_one_flipped_bit_in_an_exponent_is_found(dtype, isa):
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(isa)
    try:
        adapters = adapters_of(dtype, [(300, 200), (200, 300)], ranks=(16, 16, 16))
        first, bits = EXPONENT[dtype]
        g = torch.Generator().manual_seed(11)
        for bit, letter in [(b, letter) for b in range(bits) for letter in "AB"]:
            merged = concatenated(adapters, WEIGHTS, dtype)
            factor = getattr(merged["layers.1"], letter)
            place = int(torch.randint(factor.numel(), (), generator=g))
            factor.view(INTEGERS[dtype]).view(-1)[place] ^= 1 << (first + bit)
            report = lk.check_concat_sum(adapters, merged, weights=WEIGHTS)
            assert [module.module for module in report.failed] == ["layers.1"], (bit, letter, place)
            assert report.worst.module == "layers.1"
    finally:
        cpu._cpu.force_isa(before)


def test_a_changed_weight_is_named():
    adapters = adapters_of(torch.bfloat16, [(300, 200)], ranks=(16, 16))
    merged = concatenated(adapters, [1.0, 1.0], torch.bfloat16)
    merged["layers.0"].A[17, 40] *= 2
    (module,) = lk.check_concat_sum(adapters, merged).modules.values()
    assert "A[17, 40] does not fit its rank (1 such weights)" in module.note
    merged = concatenated(adapters, [1.0, 1.0], torch.float32)
    merged["layers.0"].B[299, 5] *= 1.01
    (module,) = lk.check_concat_sum(adapters, merged).modules.values()
    assert "row 299 differs by" in module.note and module.outliers == 0


def test_wrong_merges():
    adapters = adapters_of(torch.float32, SHAPES)
    merged = concatenated(adapters, WEIGHTS, torch.float32)
    for weights in ([0.5, 0.3, 0.7], [0.5, 0.3, -0.7001], [0.5, 0.0, -0.7], None):
        report = lk.check_concat_sum(adapters, merged, weights=weights)
        assert len(report.failed) == len(SHAPES)
    swapped = dict(merged)
    A, B, scale = merged["layers.0"]
    swapped["layers.0"] = (A[torch.randperm(15, generator=torch.Generator().manual_seed(0))], B, scale)
    report = lk.check_concat_sum(adapters, swapped, weights=WEIGHTS)
    assert [m.module for m in report.failed] == ["layers.0"] and report.worst.error > 0.1


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_concatenation_is_summation(ranks, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    adapters = adapters_of(dtype, [shape], ranks, seed)
    weights = torch.randn(len(ranks), generator=g).tolist()
    order = torch.randperm(sum(ranks), generator=g)
    A, B, scale = concatenated(adapters, weights, dtype)["layers.0"]
    assert lk.check_concat_sum(adapters, {"layers.0": (A[order], B[:, order], scale)}, weights=weights).passed
    wrong = lk.check_concat_sum(adapters, {"layers.0": (A, B, 1.1 * scale)}, weights=weights)
    assert not wrong.passed or wrong.worst.bound > 0.09, "unless the adapters cancel, and leave rounding errors"


def test_adapters_that_cancel():
    (adapter,) = adapters_of(torch.float32, SHAPES, (4,))
    zero = {name: (0 * f.A, f.B, 1.0) for name, f in adapter.items()}
    for merged in (zero, concatenated([adapter, adapter], [0.3, -0.3], torch.float32)):
        report = lk.check_concat_sum([adapter, adapter], merged, weights=[0.3, -0.3], probe=True)
        assert report.passed, str(report)
    assert not lk.check_concat_sum([adapter, adapter], adapter, weights=[0.3, -0.3]).passed


def test_missing_and_extra_modules():
    adapters = adapters_of(torch.float32, SHAPES)
    del adapters[0]["layers.1"], adapters[1]["layers.1"], adapters[2]["layers.2"]
    merged = concatenated(adapters, WEIGHTS, torch.float32)
    assert lk.check_concat_sum(adapters, merged, weights=WEIGHTS, probe=True).passed
    merged["lm_head"] = merged.pop("layers.1")
    report = lk.check_concat_sum(adapters, merged, weights=WEIGHTS)
    assert not report.passed and not report.failed
    assert report.missing == ("layers.1",) and report.extra == ("lm_head",)
    assert "missing: layers.1" in str(report) and "extra: lm_head" in str(report)
    without = lk.check_concat_sum(adapters, {n: f for n, f in merged.items() if n != "lm_head"}, weights=[0.5, 0.3, 0])
    assert without.missing == ()


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value, letter):
    adapters = adapters_of(torch.float32, SHAPES)
    merged = concatenated(adapters, WEIGHTS, torch.float32)
    getattr(merged["layers.3"], letter)[2, 1] = value
    getattr(adapters[1]["layers.0"], letter)[0, 0] = value
    report = lk.check_concat_sum(adapters, merged, weights=WEIGHTS, probe=True)
    assert {m.module: m.note for m in report.failed} == {
        "layers.3": f"{letter} of the merged adapter has 1 value that is NaN or infinite",
        "layers.0": f"{letter} of adapter 1 has 1 value that is NaN or infinite",
    }
    assert json.loads(report.to_json())["modules"][0]["error"] is None


def test_the_report():
    adapters = adapters_of(torch.float32, SHAPES)
    merged = concatenated(adapters, WEIGHTS, torch.float32)
    report = lk.check_concat_sum(adapters, merged, weights=WEIGHTS)
    assert str(report).startswith("PASS: 0 of 4 modules differ, 0 missing, 0 extra\n  worst: layers.")
    plain = json.loads(report.to_json())
    assert plain["passed"] is True and [m["module"] for m in plain["modules"]] == list(merged)
    assert plain["modules"][0]["error"] == report.modules["layers.0"].error
    again = lk.check_concat_sum(adapters, merged, weights=WEIGHTS)
    assert again == report
    assert lk.check_concat_sum(adapters, merged, weights=WEIGHTS, seed=1) != report


def test_layouts_and_loaded_adapters(tmp_path):
    adapters = adapters_of(torch.float32, SHAPES)
    merged = concatenated(adapters, WEIGHTS, torch.float32)
    apart = {n: (f.A.T.contiguous().T, f.B.T.contiguous().T, f.scale) for n, f in merged.items()}
    assert lk.check_concat_sum(adapters, apart, weights=WEIGHTS, probe=True).passed
    for i, adapter in enumerate([*adapters, merged]):
        lk.LoraAdapter(adapter).save(tmp_path / str(i))
    loaded = [lk.LoraAdapter.load(tmp_path / str(i)) for i in range(4)]
    assert lk.check_concat_sum(loaded[:3], loaded[3], weights=WEIGHTS).passed


def test_a_probe_finds_a_kernel_that_is_wrong(monkeypatch):
    adapters = adapters_of(torch.float32, SHAPES)
    merged = concatenated(adapters, WEIGHTS, torch.float32)
    honest = cpu.bgmv

    def without_gates(*arguments, **options):
        return honest(*arguments[:7], None, *arguments[8:], **options)

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "bgmv", without_gates)
        patch.setattr(fast, "bgmv", lambda *_: None)
        report = lk.check_concat_sum(adapters, merged, weights=WEIGHTS, probe=True)
        assert len(report.failed) == len(SHAPES) and "bgmv differs by" in report.worst.note
        assert lk.check_concat_sum(adapters, merged, weights=WEIGHTS).passed


FACTORS = (torch.ones(2, 6), torch.ones(5, 2), 1.0)
REFUSED = {
    "no_adapters": (([], {"q": FACTORS}), {}, "adapters must be a non-empty list of adapters"),
    "one_adapter": (({"q": FACTORS}, {"q": FACTORS}), {}, "adapters must be a non-empty list of adapters"),
    "no_mapping": (([[FACTORS]], {"q": FACTORS}), {}, "adapters must be a non-empty list of adapters"),
    "merged": (([{"q": FACTORS}], [FACTORS]), {}, "merged must be an adapter"),
    "weights": (([{"q": FACTORS}], {"q": FACTORS}), {"weights": [1, 2]}, "weights must be 1 finite numbers"),
    "nan": (([{"q": FACTORS}], {"q": FACTORS}), {"weights": [math.nan]}, "weights must be 1 finite numbers"),
    "text": (([{"q": FACTORS}], {"q": FACTORS}), {"weights": ["1"]}, "weights must be 1 finite numbers"),
    "rtol": (([{"q": FACTORS}], {"q": FACTORS}), {"rtol": -1.0}, "rtol must be a number that is not negative"),
    "seed": (([{"q": FACTORS}], {"q": FACTORS}), {"seed": None}, "seed must be an integer"),
    "shape": (
        ([{"q": FACTORS}], {"q": (torch.ones(2, 7), FACTORS[1], 1.0)}),
        {},
        "module 'q', term 1, must update a 5 x 6",
    ),
    "rank": (
        ([{"q": (FACTORS[0][:1], FACTORS[1], 1.0)}], {"q": FACTORS}),
        {},
        "module 'q', term 0, must have one",
    ),
    "pair": (([{"q": FACTORS[:2]}], {"q": FACTORS}), {}, "module 'q', term 0, must be a tuple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    arguments, options, message = REFUSED[name]
    with pytest.raises(lk.LorakernError, match=f"check_concat_sum: .*{message}"):
        lk.check_concat_sum(*arguments, **options)
