"""gram, sketch and lines against the reference, on every instruction set: dtypes, layouts, tails, and bits."""

import math

import pytest
import torch
from problems import error_ratio

import lorakern as lk
from lorakern.backends import cpu
from lorakern.ops.gram import PROBES, Lines, combine, gram, lines, sketch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COLUMNS = [1, 5, 63, 128, 1000, 2051]


@pytest.fixture(params=cpu._cpu.usable_isas())
def isa(request):
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(request.param)
    yield request.param
    cpu._cpu.force_isa(before)


def rows_of(columns, dtype, seed=0, counts=(5, 16, 1, 33)):
    """Rows that lie one after the other, as those of A do, and others side by side, as those of B do, or apart."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    rows = [randn(count, columns) for count in counts]
    return [*rows, randn(columns, 17).T, randn(2 * columns, 22)[::2, ::2].T, randn(3, columns).flip(1)]


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problems_of(columns, dtype):
    """Arguments of all three, for two problems of different rows."""
    whole = rows_of(columns, dtype)
    few = whole[:2]
    count, first, none = sum(r.shape[0] for r in whole), 21, torch.empty(0, dtype=torch.float64)
    found = [
        Lines(whole, numbers(count, PROBES), first, numbers(count).abs(), 0.5, none, 0.0),
        Lines(few[:1] * 2, numbers(10, PROBES), 5, numbers(10).abs(), 0.0, numbers(5), 1e-3),
    ]
    return [whole, few], [numbers(columns, PROBES, seed=2)] * 2, found


def close(results, wanted):
    return all(error_ratio(got, exact) < 1e-14 for got, exact in zip(results, wanted, strict=True))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_match_the_reference(isa, dtype, columns):
    problems, probes, of_lines = problems_of(columns, dtype)
    grams, sketches, found = gram(problems), sketch(problems, probes), lines(of_lines)
    with lk.use_backend("reference"):
        assert close(grams, gram(problems))
        for ours, wanted in zip(sketches, sketch(problems, probes), strict=True):
            assert close(ours, wanted)
        for ours, wanted in zip(found, lines(of_lines), strict=True):
            assert ours[:3] == pytest.approx(wanted[:3], rel=1e-12)
            assert ours[3:] == wanted[3:]
    assert all(torch.equal(g, g.T) for g in grams)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_matches_the_reference_and_writes_nothing_else(isa, dtype, columns):
    problems = [rows_of(columns, dtype), rows_of(columns, torch.float32)[1:3], rows_of(columns, dtype)[:1]]
    factors = [numbers(n, sum(r.shape[0] for r in x)) for n, x in zip((33, 1, 16), problems, strict=True)]
    wide = [torch.full((40, columns + 9), math.nan, dtype=dtype), torch.full((columns + 9, 40), math.nan, dtype=dtype)]
    out = [wide[0][2:35, 5:-4], wide[1][5:-4, 2:3].T, torch.empty(16, columns, dtype=torch.float64)]
    combine(out, problems, factors)
    wanted = [torch.empty(y.shape, dtype=torch.float64) for y in out]
    with lk.use_backend("reference"):
        combine(wanted, problems, factors)
    for y, exact in zip(out, wanted, strict=True):
        assert error_ratio(y, exact) < max(torch.finfo(y.dtype).eps / 2, 1e-14)
    assert [int(w.isnan().sum()) for w in wide] == [w.numel() - y.numel() for w, y in zip(wide, out, strict=False)]


def test_what_lies_around_the_rows_is_not_read(isa):
    for dtype in DTYPES:
        wide = torch.full((70, 300), math.nan).to(dtype)
        wide[3:40, 7:140] = torch.ones(37, 133).to(dtype)
        inner = wide[3:40, 7:140]
        assert torch.equal(gram([[inner]])[0], torch.full((37, 37), 133.0, dtype=torch.float64))
        assert torch.equal(gram([[inner.T]])[0], torch.full((133, 133), 37.0, dtype=torch.float64))


def test_bits_do_not_depend_on_the_batch_or_the_threads(isa):
    problems = [rows_of(columns, torch.float32, columns) for columns in COLUMNS] * 2
    probes = [numbers(problem[0].shape[1], PROBES) for problem in problems]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = gram(problems), sketch(problems, probes)
        factors = [numbers(7, sum(r.shape[0] for r in problem)) for problem in problems]
        combined = [torch.empty(7, problem[0].shape[1]) for problem in problems]
        combine(combined, problems, factors)
        torch.set_num_threads(1)
        for i, problem in enumerate(problems):
            assert torch.equal(gram([problem])[0], together[0][i])
            for alone, beside in zip(sketch([problem], probes[i : i + 1])[0], together[1][i], strict=True):
                assert torch.equal(alone, beside)
            y = torch.empty_like(combined[i])
            combine([y], [problem], factors[i : i + 1])
            assert torch.equal(y, combined[i])
    finally:
        torch.set_num_threads(before)


def test_sums_cancel_as_float64_does(isa):
    x = torch.ones(1, 4096)
    y = torch.ones(1, 4096)
    y[0, -1] = 1 + 2.0**-20
    (g,) = gram([[x, y]])
    assert (g[0, 0] - 2 * g[0, 1] + g[1, 1]).item() == 2.0**-40


def test_infinity_and_nan_reach_the_diagonal(isa):
    for dtype in DTYPES:
        for value in (math.nan, math.inf, -math.inf):
            rows = torch.ones(20, 150).to(dtype)
            rows[17, 141] = value
            diagonal = gram([[rows]])[0].diagonal()
            assert not diagonal[17].isfinite() and diagonal.isfinite().sum() == 19


def test_lines_find_the_worst_line_and_the_outliers(isa):
    x = torch.randn(9, 1500, generator=torch.Generator().manual_seed(0))
    merged = 2 * x
    products = torch.cat([numbers(9, PROBES), numbers(9, PROBES)])
    products[9:] = -products[:9] / 2
    ratios = torch.full((9,), 2.0, dtype=torch.float64)
    problem = Lines([x, merged], products, 9, torch.full((18,), 1e-12, dtype=torch.float64), 0.0, ratios, 0.0)
    (found,) = lines([problem])
    assert found.excess < 1e-3 and found.outliers == 0
    merged[4, 1203] *= 2
    merged[4, 1300] *= 1.1
    (found,) = lines([problem])
    assert found.line == 1203 and found.excess > 1e6
    assert (found.outliers, found.where) == (1, 1203 * 9 + 4)
    ratios[4] = math.nan
    assert lines([problem])[0].outliers == 0


def test_no_rows_and_no_work(isa):
    (g,) = gram([[torch.empty(0, 8), torch.ones(2, 8)]])
    assert g.tolist() == [[8.0, 8.0], [8.0, 8.0]]


def test_opcheck():
    problems, probes, of_lines = problems_of(40, torch.float32)
    flat, sizes = [rows for problem in problems for rows in problem], [len(problem) for problem in problems]
    torch.library.opcheck(torch.ops.lorakern.gram.default, (flat, sizes))
    torch.library.opcheck(torch.ops.lorakern.sketch.default, (flat, sizes, probes))
    combined = [torch.empty(2, 40) for _ in problems]
    factors = [numbers(2, sum(r.shape[0] for r in problem)) for problem in problems]
    torch.library.opcheck(torch.ops.lorakern.combine_.default, (combined, flat, sizes, factors))
    _, *arguments = map(list, zip(*of_lines, strict=True))
    rows = [r for problem in of_lines for r in problem.rows]
    torch.library.opcheck(torch.ops.lorakern.lines.default, (rows, [len(of_lines[0].rows), 2], *arguments))


def test_the_cpu_backend_refuses_tensors_of_other_devices():
    with pytest.raises(lk.LorakernError, match="got one on meta"):
        cpu.gram([torch.empty(2, 8, device="meta")], [1])
