"""The short way through the ops: taken for ordinary calls, bit for bit the general way, declined for all else."""

import gc
import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from problems import TOLERANCES, problem
from test_errors import BAD, OVERLAPS, call, good
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lorakern as lk
from lorakern.ops import _fast
from lorakern.ops._fast import fast

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange interface"
)
NAMES = tuple(vars(fast))


@pytest.fixture
def taken(monkeypatch):
    """Names of the ops that went the short way; `general` sends everything the other way."""
    record = SimpleNamespace(names=[])

    def watched(name, function):
        def run(*arguments):
            result = function(*arguments)
            if result is not None:
                record.names.append(name)
            return result

        return run

    def general():
        for name in NAMES:
            monkeypatch.setattr(fast, name, lambda *_: None)

    for name in NAMES:
        monkeypatch.setattr(fast, name, watched(name, getattr(fast, name)))
    record.general = general
    return record


def every_op(p, plan, accumulate):
    """The results of all ops on one problem."""
    second, tokens = min(2, len(p.x)), len(p.x)
    starts = torch.tensor([0, second, second, max(second, tokens - 1)], dtype=p.indices.dtype)
    slots = torch.tensor([3, 0, -1])
    options = {"y_offset": p.y_offset, "accumulate": accumulate}
    routed = p.options | {"plan": plan}
    h = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks, plan=plan)
    given = torch.full_like(h, float("nan"))
    y = p.y.clone()
    assert lk.bgmv(y, p.x, p.A, p.B, p.indices, **routed, **options) is y
    return [
        y,
        lk.sgmv(p.y.clone(), p.x, p.A, p.B, starts, slots, scale=p.scale, ranks=p.ranks, **options),
        lk.lora_delta(p.x, p.A, p.B, p.indices, **routed),
        h,
        lk.shrink(p.x, p.A, p.indices, ranks=p.ranks, plan=plan, out=given),
        lk.expand(p.y.clone(), h, p.B, p.indices, **routed, **options),
    ]


CHANGES = {  # what to change in a problem with every option
    "all_options": lambda p: {},
    "no_options": lambda p: {"scale": None, "ranks": None, "gates": None},
    "scale_number": lambda p: {"scale": 0.3},
    "scale_integer": lambda p: {"scale": 2},
    "int32": lambda p: {"indices": p.indices.int(), "ranks": p.ranks.int()},
    "tuples": lambda p: {"A": tuple(p.A), "B": tuple(p.B)},
    "parameters": lambda p: {name: [frozen(w) for w in getattr(p, name)] for name in "AB"} | {"x": frozen(p.x)},
    "weights_of_stride_zero": lambda p: {name: [w[:1].expand_as(w) for w in getattr(p, name)] for name in "AB"},
    "wide_rows": lambda p: {"x": torch.nn.functional.pad(p.x, (3, 5))[:, 3:-5], "A": [padded(a) for a in p.A]},
    "indices_transposed": lambda p: {"indices": p.indices.t().contiguous().t()},
    "inference_tensors": lambda p: {name: in_inference(getattr(p, name)) for name in ("x", "scale", "gates")},
}


def frozen(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


def padded(weight):
    return torch.nn.functional.pad(weight, (1, 2, 0, 3))[:, : weight.shape[1], 1:-2]


def in_inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(7, 1, (24,)), (9, 3, (24, 7)), (1, 1, (1,)), (1, 2, (5,))], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_short_way_is_taken_and_bitwise_the_general_one(taken, dtype, shape, change):
    tokens, choices, d_outs = shape
    p = problem(dtype, max(tokens, 2), choices, d_outs=d_outs).rows(0, tokens)
    p = replace(p, **CHANGES[change](p))
    runs = [(with_plan, accumulate) for with_plan in (False, True) for accumulate in (True, False)]

    def results():
        return [
            result
            for with_plan, accumulate in runs
            for result in every_op(p, lk.plan(p.indices, 5) if with_plan else None, accumulate)
        ]

    short = results()
    assert len(taken.names) == len(short)
    taken.general()
    for one, other in zip(short, results(), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("change", [{"indices": "flat"}, {"indices": "flat", "gates": "flat"}, {"gates": "column"}])
def test_one_choice_in_every_shape(taken, change):
    p = problem(tokens=6)
    shapes = {"flat": lambda t: t[:, 0].contiguous(), "column": lambda t: t}
    p = replace(p, **{name: shapes[shape](getattr(p, name)) for name, shape in change.items()})
    result = p.bgmv()
    assert taken.names == ["bgmv"]
    taken.general()
    assert torch.equal(result, p.bgmv())


def test_views_of_parameters_and_no_grad(taken):
    """Trainable weights are ordinary where no gradient is wanted."""
    p = problem().without_nan()
    p.A, p.B = [torch.nn.Parameter(a) for a in p.A], [torch.nn.Parameter(b) for b in p.B]
    with torch.no_grad():
        expected = p.bgmv()
    with torch.inference_mode():
        assert torch.equal(p.bgmv(), expected)
    assert taken.names == ["bgmv"] * 2
    assert p.bgmv().requires_grad and taken.names == ["bgmv"] * 2


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", ["y", "x", "A", "B", "scale", "gates"])
def test_declined_for_gradients_subclasses_and_negated_views(taken, name):
    p = problem().without_nan()
    expected = p.bgmv()

    def result(change):
        arguments = {"y": p.y.clone(), "x": p.x, "A": p.A[0], "B": p.B[0]} | p.options
        arguments[name] = change(arguments[name])
        y, x, A, B = (arguments.pop(n) for n in ("y", "x", "A", "B"))
        return lk.bgmv(y, x, A, B, p.indices, **arguments, y_offset=3)

    taken.names.clear()
    wanted = result(lambda t: t.clone().requires_grad_() if name != "y" else t.clone().requires_grad_() * 1)
    assert wanted.requires_grad and torch.allclose(wanted, expected)
    assert torch.equal(result(lambda t: t.as_subclass(Subclass)).as_subclass(torch.Tensor), expected)
    if name != "y":
        assert torch.equal(result(lambda t: torch._neg_view(-t)), expected)
    else:
        with pytest.raises(RuntimeError):  # torch's own fallback for such views takes no op that returns nothing
            result(lambda t: torch._neg_view(-t))
    assert taken.names == []


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"x": p.x.t().contiguous().t()},
        lambda p: {"y": p.y.t().contiguous().t()},
        lambda p: {"scale": p.scale.double()},
        lambda p: {"scale": torch.stack([p.scale, p.scale], 1)[:, 0]},
        lambda p: {"ranks": torch.stack([p.ranks, p.ranks], 1)[:, 0]},
        lambda p: {"gates": p.gates.double()},
        lambda p: {"scale": True},
    ],
)
def test_declined_where_a_copy_is_needed(taken, change):
    p = problem()
    changed = replace(p, **change(p))
    result = changed.y.clone(memory_format=torch.preserve_format)
    lk.bgmv(result, changed.x, p.A, p.B, p.indices, **changed.options, y_offset=3)
    assert taken.names == [] and not torch.equal(result, p.y)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_op(taken, mode):
    p = problem()
    expected = p.bgmv()
    with mode() as active:
        result = p.bgmv()
    assert torch.equal(result, expected) and taken.names == ["bgmv"]
    assert any("lorakern.bgmv_" in name for name in active.seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_declined_where_torch_is_watched_or_transformed(taken):
    p = problem(options=False)
    expected, delta = p.bgmv(), lk.lora_delta(p.x, p.A, p.B, p.indices)
    taken.names.clear()
    with torch.device("cpu"):
        assert torch.equal(p.bgmv(), expected)
    with lk.use_backend("reference"):
        p.bgmv()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(p.bgmv(), expected)
    assert any("lorakern::bgmv_" in event.name for event in profile.events())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x = fake.from_tensor(p.x)
        assert lk.lora_delta(x, p.A, p.B, p.indices).shape == delta.shape

    def function(x):
        return lk.lora_delta(x, p.A, p.B, p.indices)

    for pre_dispatch in (False, True):
        graph = make_fx(function, pre_dispatch=pre_dispatch)(p.x)
        assert "lorakern.lora_delta" in graph.code and torch.equal(graph(p.x), delta)
    traced = torch.jit.trace(function, p.x, check_trace=False)
    assert "lorakern::lora_delta" in str(traced.graph)
    assert torch.equal(torch.vmap(lambda t: p.bgmv() * t)(torch.ones(3))[2], expected)
    torch.func.grad(lambda t: (p.bgmv() * t).sum())(torch.tensor(1.0))
    assert taken.names == []
    with lk.use_backend("cpu"):
        assert torch.equal(p.bgmv(), expected)
    assert taken.names == ["bgmv"]


def test_compiled_code_calls_the_registered_op(taken):
    torch._dynamo.reset()
    p = problem(options=False)
    expected, graphs = p.bgmv(), []
    taken.names.clear()

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(
        lambda y: lk.bgmv(y, p.x, p.A, p.B, p.indices, y_offset=3), fullgraph=True, backend=backend
    )
    assert torch.equal(compiled(p.y.clone()), expected)
    assert len(graphs) == 1 and "lorakern.bgmv_" in graphs[0] and taken.names == []
    torch._dynamo.reset()


def outcome(function, y):
    before = y.clone()
    with pytest.raises(lk.LorakernError) as error:
        function()
    assert torch.equal(y, before)
    return type(error.value), str(error.value)


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_the_general_way(taken, name):
    arguments = good()
    arguments |= BAD[name][0](arguments)
    if isinstance(arguments["x"], str):
        arguments["x"] = arguments["y"]
    short = outcome(lambda: call(arguments), arguments["y"])
    assert taken.names == []
    taken.general()
    assert outcome(lambda: call(arguments), arguments["y"]) == short


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlaps_are_declined(taken, name):
    y, x = OVERLAPS[name](torch.zeros(9, 96))
    a, b, indices = torch.randn(2, 4, x.shape[1]), torch.randn(2, 32, 4), torch.arange(len(x)) % 2
    short = outcome(lambda: lk.bgmv(y, x, a, b, indices), y)
    taken.general()
    assert outcome(lambda: lk.bgmv(y, x, a, b, indices), y) == short


@pytest.mark.parametrize(
    ("seg_starts", "slots"),
    [([0, 4, 3], [0, 1]), ([-1, 3, 6], [0, 1]), ([0, 3, 7], [0, 1]), ([0, 6], [0, 1]), ([0, 3, 6], [0, 4])],
)
def test_bad_segments_are_declined(taken, seg_starts, slots):
    a = good()

    def run():
        lk.sgmv(a["y"], a["x"], a["A"], a["B"], torch.tensor(seg_starts), torch.tensor(slots))

    short = outcome(run, a["y"])
    taken.general()
    assert outcome(run, a["y"]) == short


@pytest.mark.parametrize("scale", [10**400, -(10**400), 1e300, float("inf"), float("nan")])
def test_numbers_out_of_the_ordinary(taken, scale):
    p = problem()
    p.scale = scale

    def run():
        try:
            return p.bgmv().nan_to_num(7.0).tolist()
        except (RuntimeError, OverflowError) as error:
            return repr(error)

    short = run()
    assert taken.names == []
    taken.general()
    assert run() == short


def test_zero_dimensional_and_empty_arguments(taken):
    p, scalar = problem(options=False), torch.tensor(1)
    with pytest.raises(lk.LorakernError, match="seg_starts"):
        lk.sgmv(p.y, p.x, p.A, p.B, scalar, scalar)
    with pytest.raises(lk.LorakernError, match="indices"):
        lk.bgmv(p.y, p.x, p.A, p.B, scalar)
    lk.bgmv(p.y[:0], p.x[:0], p.A, p.B, p.indices[:0])
    lk.bgmv(p.y, p.x, [a[:, :0] for a in p.A], [b[..., :0] for b in p.B], p.indices)
    assert taken.names == []


def test_what_was_written_is_marked(taken):
    p = problem(options=False)
    y, h = p.y.clone(), lk.shrink(p.x, p.A, p.indices)
    versions = []
    for function in (
        lambda: lk.bgmv(y, p.x, p.A, p.B, p.indices),
        lambda: lk.expand(y, h, p.B, p.indices),
        lambda: lk.sgmv(y, p.x, p.A, p.B, torch.tensor([0, 3]), torch.tensor([1])),
    ):
        before = y._version
        function()
        versions.append(y._version - before)
    before = h._version
    lk.shrink(p.x, p.A, p.indices, out=h)
    assert versions == [1, 1, 1] and h._version == before + 1
    assert p.x._version == p.A[0]._version == p.B[0]._version == 0
    assert taken.names == ["shrink", "bgmv", "expand", "sgmv", "shrink"]


def test_threads_are_those_of_torch(taken, monkeypatch):
    p = problem(tokens=300, d_in=500, d_outs=(400,), r_max=32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(p.bgmv())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) and len(taken.names) == 3


def test_no_reference_is_kept_or_lost():
    p = problem(choices=2, d_outs=(24, 7))
    plan, out = lk.plan(p.indices, 5), lk.shrink(p.x, p.A, p.indices)
    seg_starts, slots, bad = torch.tensor([0, 3, 7]), torch.tensor([1, 2]), p.indices + 5
    watched = [
        p.y,
        p.x,
        p.A,
        p.B,
        *p.A,
        *p.B,
        p.indices,
        p.scale,
        p.ranks,
        p.gates,
        plan,
        *plan,
        out,
        seg_starts,
        slots,
    ]
    watched += [None, True, False, torch.float32]

    def run(times):
        for _ in range(times):
            lk.bgmv(p.y, p.x, p.A, p.B, p.indices, **p.options, plan=plan, y_offset=3)
            lk.sgmv(p.y, p.x, tuple(p.A), tuple(p.B), seg_starts, slots, scale=0.5, y_offset=3)
            lk.lora_delta(p.x, p.A, p.B, p.indices, **p.options)
            lk.shrink(p.x, p.A, p.indices)
            lk.shrink(p.x, p.A, p.indices, out=out)
            lk.expand(p.y, out, p.B, p.indices, y_offset=3)
            assert fast.bgmv(p.y, p.x, p.A, p.B, bad, None, None, None, None, 3, True, False) is None
            assert fast.lora_delta(p.x, p.A, p.B, bad, None, None, None, None) is None

    run(50)
    gc.collect()
    before, memory = [sys.getrefcount(o) for o in watched], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(1000)
    after = [sys.getrefcount(o) for o in watched]
    assert max(abs(b - a) for a, b in zip(after, before, strict=True)) < 100 and after[:-4] == before[:-4]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 4096  # KiB


def test_no_short_way_without_the_interface(monkeypatch):
    class Old:
        pass

    monkeypatch.setattr(torch, "Tensor", Old)
    assert _fast._make() == {}
    Old.__dlpack_c_exchange_api__, Old.is_neg = object(), None
    assert _fast._make() == {}


def test_arguments_are_counted():
    with pytest.raises(TypeError, match="takes 12 positional arguments; got 1"):
        fast.bgmv(None)
