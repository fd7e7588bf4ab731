"""lorakern.merge: the arguments that all methods share, bad ones, and methods of third parties."""

import inspect
from typing import Annotated, Literal

import pytest
import torch
from merging import ALL, SHAPES, SYMMETRIC, factors, total, update
from problems import error_ratio

import lorakern as lk
from lorakern.merge import Range, Term, merge_modules, method, methods, module_generator, register
from lorakern.merge.registry import _METHODS, RESERVED


@pytest.fixture
def registry():
    """Methods that a test adds are gone after it."""
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


# what the arguments mean


def test_missing_modules_and_normalized_weights():
    a = {"x": factors(5, 7, 2, seed=1), "y": factors(4, 7, 2, seed=2)}
    b = {"x": factors(5, 7, 3, seed=3)}

    def merged(**options):
        result = lk.merge([a, b], weights=[1.0, 3.0], dtype=torch.float64, **options)
        return update(result["x"]), update(result["y"])

    x, y = total([a, b], [1.0, 3.0], "x"), update(a["y"])
    for options, x_share, y_share in (
        ({}, 1.0, 1.0),
        ({"missing": "skip"}, 1.0, 1.0),
        ({"normalize": True}, 0.25, 0.25),
        ({"normalize": True, "missing": "skip"}, 0.25, 1.0),
    ):
        result = merged(**options)
        assert error_ratio(result[0], x * x_share) < 1e-6 and error_ratio(result[1], y * y_share) < 1e-6
    with pytest.raises(lk.LorakernError, match=r"y: adapter 1 lacks this module, which adapter 0 has; merge with miss"):
        merged(missing="error")
    with pytest.raises(lk.LorakernError, match=r"x: weights \[1.0, -1.0\] sum to zero"):
        lk.merge([a, b], weights=[1.0, -1.0], normalize=True)


def test_dtype_and_overflow():
    a, b = {"p": factors(5, 7, 2, 1.0, torch.float16)}, {"p": factors(5, 7, 2, 1.0, torch.bfloat16, seed=1)}
    assert lk.merge([a])["p"].A.dtype == torch.float16
    assert lk.merge([a, b])["p"].A.dtype == torch.float32
    assert lk.merge([a, b], dtype=torch.bfloat16)["p"].B.dtype == torch.bfloat16
    with pytest.raises(lk.LorakernError, match=r"p: the merged factors are not finite in torch.float16; merge with"):
        lk.merge([a], "linear", weights=[1e12])


def test_per_module_arguments():
    adapters = [{f"layers.{i}": factors(20, 30, 4, seed=10 * i + j) for i in range(2)} for j in range(2)]
    one = {"weights": [0.0, 2.0], "rank": 3, "density": 0.25}
    merged = lk.merge(adapters, "ties", per_module=lambda module: one if module.endswith("1") else {})
    for i, arguments in enumerate([{}, one]):
        alone = lk.merge([{f"layers.{i}": adapter[f"layers.{i}"]} for adapter in adapters], "ties", **arguments)
        assert torch.equal(alone[f"layers.{i}"].A, merged[f"layers.{i}"].A)
    with pytest.raises(lk.LorakernError, match=r"layers.1: ties: there is no option 'densty'; the options of this"):
        lk.merge(adapters, "ties", per_module=lambda module: {"densty": 1} if module.endswith("1") else {})


def test_modules_are_merged_when_asked_for():
    """Peak memory of a streaming writer: each adapter's factors are looked up once, when their turn comes."""

    class Lazy(dict):
        def __getitem__(self, module):
            looked_up.append(module)
            return super().__getitem__(module)

    looked_up, seen = [], []
    adapter = Lazy({m: factors(5, 7, 2) for m in ("a", "b", "c")})
    stream = merge_modules([adapter, adapter], "svd", progress=lambda *call: seen.append(call))
    assert looked_up == [] and seen == []
    assert next(stream)[0] == "a" and looked_up == ["a", "a"]
    assert next(stream)[0] == "b" and looked_up == ["a", "a", "b", "b"]
    assert seen == [(1, 3, "a")]
    assert [module for module, _ in stream] == ["c"]
    assert seen == [(1, 3, "a"), (2, 3, "b"), (3, 3, "c")]


def test_configs_are_kept_or_refused():
    def adapter(**config):
        return lk.LoraAdapter({"p": factors(5, 7, 2)}, **config)

    gpt = {"fan_in_fan_out": True, "base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM"}
    merged = lk.merge([adapter(**gpt), adapter(**gpt), {"p": factors(5, 7, 2)}]).config
    assert (merged.fan_in_fan_out, merged.base_model_name_or_path, merged.task_type) == (True, "gpt2", "CAUSAL_LM")
    with pytest.raises(lk.LorakernError, match=r"fan_in_fan_out is True in adapter 0 and False in adapter 1; thei"):
        lk.merge([adapter(**gpt), adapter()])
    names = [adapter(base_model_name_or_path=name) for name in ("meta/a", None, "/models/a")]
    with pytest.raises(lk.LorakernError, match=r"base_model_name_or_path is 'meta/a' in adapter 0 and '/models/a' in"):
        lk.merge(names)
    assert lk.merge(names, base_model_name_or_path="a").config.base_model_name_or_path == "a"
    assert lk.merge([adapter(task_type="CAUSAL_LM"), adapter()]).config.task_type is None


def test_zero_updates():
    zero = {"p": (torch.zeros(3, 7), torch.zeros(5, 3), 1.0)}
    for name in ALL:
        for adapters in ([zero], [zero, zero]):
            merged = lk.merge(adapters, name)["p"]
            assert not update(merged).any() and merged.rank >= 1
    for name, options in SYMMETRIC.items():
        if name != "fedex":
            merged = lk.merge([{"p": factors(5, 7, 3)}], name, weights=[0.0], **options)["p"]
            assert not update(merged).any()


# bad input


GOOD = {"p": factors(5, 7, 2)}
BAD = {
    "no_adapters": (([],), {}, r"adapters must be a list of at least one adapter, got \[\]"),
    "one_adapter": ((GOOD,), {}, "adapters must be a list of at least one adapter"),
    "paths": ((["some/dir"],), {}, r"adapters\[0\] must be a LoraAdapter or a mapping .*LoraAdapter.load reads"),
    "no_module": (([{}],), {}, "adapters hold no module"),
    "module_name": (([{"": GOOD["p"]}],), {}, "a module path must be the printable name"),
    "method": (([GOOD], "tyes"), {}, r"method must be one of cat, dare_linear, .*, got 'tyes'"),
    "method_type": (([GOOD], 3), {}, "method must be one of"),
    "weights_count": (([GOOD],), {"weights": [1, 2]}, r"weights must be None or a list of 1 numbers.*got \[1, 2\]"),
    "weights_nan": (([GOOD],), {"weights": [float("nan")]}, "weights must be None or a list"),
    "weights_string": (([GOOD],), {"weights": "1"}, "weights must be None or a list"),
    "weights_bool": (([GOOD],), {"weights": [True]}, "weights must be None or a list"),
    "weights_scalar": (([GOOD],), {"weights": 1.0}, "weights must be None or a list"),
    "weight_overflow": (([{"p": (*GOOD["p"][:2], 1e200)}],), {"weights": [1e200]}, "p: the weight of adapter 0, 1e"),
    "rank_zero": (([GOOD],), {"rank": 0}, "rank must be None, a positive integer, or a share"),
    "rank_one_as_float": (([GOOD],), {"rank": 1.0}, "rank must be None, a positive integer, or a share"),
    "rank_bool": (([GOOD],), {"rank": True}, "rank must be None, a positive integer, or a share"),
    "rank_string": (([GOOD],), {"rank": "8"}, "rank must be None, a positive integer, or a share"),
    "rank_share": (
        ([GOOD], "ties"),
        {"rank": 0.5},
        "p: rank must be a positive integer or None for a method that",
    ),
    "dtype": (([GOOD],), {"dtype": torch.int8}, "dtype must be None or one of"),
    "dtype_string": (([GOOD],), {"dtype": "float16"}, "dtype must be None or one of"),
    "seed": (([GOOD],), {"seed": 1.5}, "seed must be an integer, got 1.5"),
    "missing": (([GOOD],), {"missing": "no"}, "missing must be one of zero, skip, error, got 'no'"),
    "normalize": (([GOOD],), {"normalize": 1}, "normalize must be True or False, got 1"),
    "device": (([GOOD],), {"device": "toaster"}, "device must be one of torch, .*got 'toaster'"),
    "option": (
        ([GOOD], "cat"),
        {"density": 0.5},
        "cat: there is no option 'density'; the options of this method are",
    ),
    "option_name": (
        ([GOOD], "ties"),
        {"dens": 0.5},
        "ties: there is no option 'dens'; the options .*: density: a n",
    ),
    "density_high": (
        ([GOOD], "ties"),
        {"density": 1.5},
        "ties: density must be a number above 0 and at most 1 or a list with one for each adapter, got",
    ),
    "density_zero": (([GOOD], "dare_ties"), {"density": 0}, "dare_ties: density must be a number above 0"),
    "density_nan": (([GOOD], "ties"), {"density": float("nan")}, "ties: density must be"),
    "density_type": (([GOOD], "ties"), {"density": "0.5"}, "ties: density must be"),
    "density_bool": (([GOOD], "ties"), {"density": True}, "ties: density must be"),
    "sign": (([GOOD], "ties"), {"majority_sign_method": "most"}, "must be 'total' or 'frequency', got 'most'"),
    "d_in": (
        ([GOOD, {"p": factors(5, 8, 2)}],),
        {},
        r"p: d_in, d_out are \(7, 5\) in adapter 0 and \(8, 5\) in adap",
    ),
    "d_out": (
        ([GOOD, {"p": factors(6, 7, 2)}],),
        {},
        r"p: d_in, d_out are \(7, 5\) in adapter 0 and \(7, 6\) in ad",
    ),
    "factors": (([GOOD, {"p": (1, 2)}],), {}, r"adapter 1: p: factors must be a tuple \(A, B, scale\)"),
    "nan": (([GOOD, {"p": (torch.full((2, 7), torch.nan), torch.ones(5, 2), 1)}],), {}, "p: A of adapter 1 holds NaN"),
    "inf": (([{"p": (torch.ones(2, 7), torch.full((5, 2), torch.inf), 1)}],), {}, "p: B of adapter 0 holds NaN or inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    positional, keywords, message = BAD[name]
    with pytest.raises(lk.LorakernError, match=message):
        lk.merge(*positional, **keywords)


def test_arguments_are_checked_before_the_first_module():
    with pytest.raises(lk.LorakernError, match="ties: there is no option"):
        merge_modules([GOOD], "ties", denisty=0.5)


def test_errors_name_the_file(tmp_path):
    lk.LoraAdapter({"p": factors(5, 8, 2)}).save(tmp_path)
    with pytest.raises(lk.LorakernError, match=rf"p: d_in, d_out .* in adapter 1 \({tmp_path}\)"):
        lk.merge([GOOD, lk.LoraAdapter.load(tmp_path)])


# the package and its registry


def test_the_package_is_the_function_too():
    import lorakern.merge
    from lorakern.merge import merge

    assert lk.merge is lorakern.merge and inspect.ismodule(lk.merge)
    assert torch.equal(lk.merge([GOOD])["p"].A, merge([GOOD])["p"].A)
    assert inspect.signature(lk.merge) == inspect.signature(merge)
    assert lorakern.merge.methods["ties"].function.__module__ == "lorakern.merge.ties"
    assert "merge" in lk.__all__


def test_shared_arguments_are_reserved():
    shared = inspect.signature(lk.merge.merge).parameters.keys() - {"options"}
    assert shared == RESERVED
    streamed = inspect.signature(merge_modules).parameters.keys() - {"options"}
    assert shared - streamed == {"base_model_name_or_path"}


def test_a_method_is_one_decorated_function(registry):
    @method("mine")
    def mine(
        terms,
        rank,
        generator,
        *,
        gain: Annotated[float, Range(0, 10)] = 1.0,
        how: Literal["first", "last"] = "first",
        limit: int | None = None,
    ):
        """The first or last
        adapter.

        More."""
        assert all(isinstance(term, Term) for term in terms) and isinstance(generator, torch.Generator)
        term = terms[0 if how == "first" else -1]
        return term.A[:limit], term.B[:, :limit], gain * term.factor

    assert methods["mine"].summary == "The first or last adapter." and not methods["mine"].whole
    a, b = {"p": factors(5, 7, 2, 0.5)}, {"p": factors(5, 7, 3, 2.0, seed=1)}
    merged = lk.merge([a, b], "mine", weights=[1, 2], how="last", gain=3, limit=1)["p"]
    assert merged.rank == 1 and merged.scale == 12.0
    assert torch.equal(merged.A, b["p"][0][:1])
    for option, message in {
        "gain": "mine: gain must be a number at least 0 and at most 10, got 11",
        "how": "mine: how must be 'first' or 'last', got 11",
        "what": "mine: there is no option 'what'; .*: gain: a number .*; limit: an integer or None",
    }.items():
        with pytest.raises(lk.LorakernError, match=message):
            lk.merge([a, b], "mine", **{option: 11})
    with pytest.raises(lk.LorakernError, match=r"mine: limit must be an integer or None, got 1\.5"):
        lk.merge([a, b], "mine", limit=1.5)


def test_a_method_may_take_all_modules_at_once(registry):
    @method("together", whole=True)
    def together(modules, ranks, generators, *, power: int):
        calls.append(list(modules))
        assert "nothing" not in modules
        assert [ranks(module) for module in modules] == [2 if module == "v_proj" else None for module in modules]
        whole = sum(term.rank for terms in modules.values() for term in terms)
        for module in reversed(list(modules)):
            term = modules[module][0]
            assert generators(module).initial_seed() == module_generator(3, module).initial_seed()
            yield module, (term.A, term.B, float(whole**power))

    adapters = [{m: factors(*SHAPES[m], 2) for m in SHAPES}, {"q_proj": factors(5, 7, 3)}]
    calls = []
    merged = lk.merge(adapters, "together", seed=3, power=2, rank={"v_proj": 2})
    assert calls == [list(SHAPES)]
    assert list(merged) == list(reversed(SHAPES)) and merged["v_proj"].scale == 81.0
    with pytest.raises(lk.LorakernError, match="together: option power must be given, it is an integer"):
        lk.merge(adapters, "together")
    # once for all modules of the same options
    calls.clear()
    given = {"q_proj": {}, "v_proj": {"power": 1, "rank": 2}, "down_proj": {"weights": [3.0, 1.0]}}
    merged = lk.merge(adapters, "together", seed=3, power=2, per_module=given.__getitem__)
    assert sorted(calls) == [["q_proj", "down_proj"], ["v_proj"]]
    assert merged["v_proj"].scale == 2.0 and merged["q_proj"].scale == 49.0
    with pytest.raises(lk.LorakernError, match=r"v_proj: together: power must be an integer, got 0\.5"):
        lk.merge(adapters, "together", power=1, per_module=lambda module: {"power": 0.5} if "v_" in module else {})


def test_a_method_that_breaks_its_word(registry):
    ones = torch.ones(5, 2), torch.ones(2, 7)
    register("shape", lambda terms, rank, generator: (torch.ones(2, 7), torch.ones(6, 2)))
    register("swapped", lambda terms, rank, generator: ones)
    register("nothing", lambda terms, rank, generator: None)
    register("twice", lambda modules, rank, generators: [("p", ones[::-1])] * 2, whole=True)
    register("never", lambda modules, rank, generators: [], whole=True)
    for name, message in {
        "shape": r"p: shape returned A \(2, 7\) and B \(6, 2\) for an update of shape \(5, 7\)",
        "swapped": r"p: swapped must return \(A, B\) or \(A, B, scale\)",
        "nothing": r"p: nothing must return \(A, B\) or \(A, B, scale\)",
        "twice": "twice: it yielded 'p', which is done or unknown",
        "never": "never: it yielded nothing for p",
    }.items():
        with pytest.raises(lk.LorakernError, match=message):
            lk.merge([GOOD], name)


def test_registration_is_checked(registry):
    def good(terms, rank, generator):
        return terms[0].A, terms[0].B

    def two(terms, rank):
        return None

    def untyped(terms, rank, generator, *, gain=1.0):
        return None

    def reserved(terms, rank, generator, *, seed: int = 0):
        return None

    def anything(terms, rank, generator, **options):
        return None

    for name, function, message in [
        ("ties", good, "name 'ties' is taken by lorakern.merge.ties"),
        ("a b", good, "name must be the name of a method"),
        (None, good, "name must be the name of a method"),
        ("x", two, "a merge method takes 3 positional arguments"),
        ("x", anything, "a merge method takes 3 positional arguments"),
        ("x", untyped, "option gain has no type"),
        ("x", reserved, "x: option seed is an argument of lk.merge itself"),
    ]:
        with pytest.raises(lk.LorakernError, match=message):
            register(name, function)
    assert "x" not in methods
    with pytest.raises(TypeError):
        methods["x"] = good
