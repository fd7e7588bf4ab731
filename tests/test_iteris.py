"""IterIS and RegMean: the formulas written densely, their identities and limits, and the model left alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iteris_problems import Problem
from merging import update
from problems import error_ratio

import lorakern as lk
from lorakern.merge import iteris
from lorakern.merge.iteris.equations import cholesky, solve_symmetric

pytestmark = pytest.mark.usefixtures("one_thread")


def solve(problem, **options):
    return iteris.solve(problem.model, problem.adapters, problem.samples, **options)


def assert_updates(result, exact, tolerance):
    assert list(result) == list(exact)
    for name in exact:
        assert result[name].dtype == torch.float32 and result[name].shape == exact[name].shape
        assert error_ratio(result[name], exact[name]) < tolerance


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 1, "alpha": 0.0, "lambda_source": None},
        {"iterations": 1, "alpha": 1e-3},
        {"iterations": 2, "alpha": 1e-3},
        {"iterations": 3, "alpha": 1e-2, "lambda_source": "delta"},
        {"iterations": 3, "alpha": 1e-2, "target": "full"},
        {"iterations": 2, "alpha": 1e-2, "target": "full", "lambda_source": "delta"},
        {"iterations": 3, "alpha": 1e-2, "ratio": 0.25, "coefficients": [0.5, 2.0, 1.0]},
    ],
    ids=str,
)
def test_the_updates_and_the_objective_are_those_of_the_formulas(options):
    problem = Problem(count=3)
    solution = solve(problem, **options)
    dense = {"lambdas" if name == "lambda_source" else name: value for name, value in options.items()}
    updates, objective = problem.dense(**dense)
    assert_updates(solution.updates, updates, 2e-4)
    assert len(solution.objectives) == options["iterations"]
    assert solution.objectives[-1] == pytest.approx(objective, rel=1e-4)
    assert solution.objectives[-1] == sum(solution.module_objectives[-1].values())
    assert not solution.undetermined


def test_regmean_is_the_dense_one():
    problem = Problem(count=4, tokens=(50,))
    solution = iteris.regmean(problem.model, problem.adapters, problem.samples)
    for name in problem.names:
        deltas = problem.deltas(name)
        X = [problem.inputs(i, {n: problem.deltas(n)[i] for n in problem.names})[name] for i in range(4)]
        grams = [x.T @ x for x in X]
        exact = sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ torch.linalg.inv(sum(grams))
        assert error_ratio(solution.updates[name], exact) < 1e-5
    assert all(lambdas == [1.0] * 4 for lambdas in solution.lambdas.values())


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(3)),
    factor=st.sampled_from([1e-3, 0.5, 1.0, 40.0]),
    iterations=st.integers(1, 3),
    target=st.sampled_from(["delta", "full"]),
    lambda_source=st.sampled_from(["delta", "full", None]),
)
def test_neither_the_order_nor_the_size_of_all_coefficients_matters(order, factor, iterations, target, lambda_source):
    problem, coefficients = Problem(count=3), [1.0, 0.25, 2.0]
    options = {"iterations": iterations, "target": target, "lambda_source": lambda_source, "alpha": 1e-3}
    plain = solve(problem, coefficients=coefficients, **options)
    problem.adapters = [problem.adapters[i] for i in order]
    problem.samples = [problem.samples[i] for i in order]
    other = solve(problem, coefficients=[factor * coefficients[i] for i in order], **options)
    for name, exact in plain.updates.items():
        assert error_ratio(other.updates[name], exact) < 1e-4
        assert [other.lambdas[name][order.index(i)] for i in range(3)] == plain.lambdas[name]
    assert other.objectives == pytest.approx([factor * value for value in plain.objectives], rel=1e-3)


@pytest.mark.parametrize("target", ["delta", "full"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_one_adapter_is_returned(target, iterations):
    problem = Problem(count=1)
    solution = solve(problem, iterations=iterations, target=target, alpha=1e-6)
    assert_updates(solution.updates, {name: problem.deltas(name)[0] for name in problem.names}, 1e-4)
    assert solution.objectives[-1] < 1e-6 * solve(Problem(), iterations=1).objectives[-1]


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 10.0])
def test_equal_adapters_are_returned(alpha):
    problem = Problem(count=3)
    problem.adapters = [problem.adapters[1]] * 3
    solution = solve(problem, iterations=3, alpha=alpha)
    assert_updates(solution.updates, {name: problem.deltas(name)[1] for name in problem.names}, 1e-4)


def test_a_large_alpha_gives_an_average_by_the_norms():
    problem = Problem(count=2)
    solution = solve(problem, iterations=2, alpha=1e7)
    task = [problem.inputs(i, {n: problem.deltas(n)[i] for n in problem.names}) for i in range(2)]
    first = solve(problem, iterations=1, alpha=1e7).updates
    merged = [problem.inputs(i, {n: u.double() for n, u in first.items()}) for i in range(2)]
    for name in problem.names:
        lambdas, deltas = solution.lambdas[name], problem.deltas(name)
        crossed = [float((task[i][name].T @ merged[i][name]).norm()) for i in range(2)]
        own = [float((merged[i][name].T @ merged[i][name]).norm()) for i in range(2)]
        above = sum(lam * n * d for lam, n, d in zip(lambdas, crossed, deltas, strict=True))
        below = sum(lam * n for lam, n in zip(lambdas, own, strict=True))
        assert error_ratio(solution.updates[name], above / below) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_four_layers_reach_their_fixed_point_at_the_fourth_solve_below_regmean(seed):
    problem = Problem(seed=seed)
    third, fourth, fifth, tenth = (solve(problem, iterations=n, alpha=1e-7) for n in (3, 4, 5, 10))
    for name in problem.names:
        assert torch.equal(fourth.updates[name], fifth.updates[name])
        assert torch.equal(fourth.updates[name], tenth.updates[name])
    assert not torch.equal(third.updates["6"], fourth.updates["6"])
    assert torch.equal(third.updates["4"], fourth.updates["4"])
    assert tenth.objectives[:3] == third.objectives
    assert tenth.objectives[3:] == [tenth.objectives[-1]] * 7
    # the first sweep of the same call is RegMean with these lambdas
    assert tenth.objectives[-1] < 0.9 * tenth.objectives[0]


@pytest.mark.parametrize(("extra", "parts"), [(0, 4), (892, 3)])
def test_layers_in_parts_give_the_same_bits(extra, parts):
    problem = Problem(count=3)
    calls, largest = [], 4 * 9**2 + 8 * 9 * (3 * 9 + 2 + 3 + 4)
    whole = solve(problem, iterations=3)
    # 892 more are just enough for the last two layers together
    small = solve(problem, iterations=3, max_memory=largest + extra, progress=lambda *call: calls.append(call))
    passes = 4 * parts * 3
    assert [done for done, *_ in calls] == list(range(passes)) and {total for _, total, _ in calls} == {passes}
    assert calls[-1][2].startswith("objective") and calls[-1][2].endswith("6, adapter 2")
    for name in problem.names:
        assert torch.equal(whole.updates[name], small.updates[name])
    assert whole.module_objectives == small.module_objectives
    with pytest.raises(lk.LorakernError, match=f"'2'.*{largest} bytes"):
        solve(problem, max_memory=largest - 1)


def test_a_module_that_only_one_adapter_has_counts_as_zero_for_the_other():
    problem = Problem()
    problem.adapters[0] = {name: f for name, f in problem.adapters[0].items() if name != "2"}
    partial = solve(problem, iterations=2, alpha=1e-3)
    A, B, _ = Problem().adapters[0]["2"]
    problem.adapters[0] |= {"2": lk.LoraFactors(A, B, 0.0)}
    zero = solve(problem, iterations=2, alpha=1e-3)
    for name in problem.names:
        assert error_ratio(partial.updates[name], zero.updates[name]) < 1e-6
    assert partial.updates["2"].any()
    with pytest.raises(lk.LorakernError, match=r"'2'.*adapter 0 gives zero.*lambda_source"):
        solve(problem, lambda_source="delta")


def test_directions_that_no_sample_reaches_get_no_update_and_are_reported():
    problem = Problem(sizes=(7, 5), count=1, tokens=(3,))
    solution = iteris.regmean(problem.model, problem.adapters, problem.samples)
    assert solution.undetermined == {"0": 4}
    X = problem.samples[0][0].double()
    seen = torch.linalg.pinv(X) @ X
    assert error_ratio(solution.updates["0"], problem.deltas("0")[0] @ seen) < 1e-5
    full = iteris.regmean(problem.model, problem.adapters, problem.samples, target="full")
    assert error_ratio(full.updates["0"], solution.updates["0"]) < 1e-4
    assert not solve(problem, iterations=1, alpha=1e-3).undetermined


@pytest.mark.parametrize(("n", "block"), [(1, 3), (5, 2), (6, 2), (63, 16), (600, 256)])
def test_cholesky_by_blocks(n, block):
    X = torch.randn(n + 9, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    D = X.T @ X
    L = cholesky(D.clone(), block).tril()
    assert error_ratio(L, torch.linalg.cholesky(D)) < 1e-11
    D[-1, -1] = -1.0
    assert cholesky(D, block) is None


def test_symmetric_systems_regular_and_singular():
    g = torch.Generator().manual_seed(3)
    X = torch.randn(20, 6, generator=g, dtype=torch.float64) * torch.logspace(-6, 2, 6, dtype=torch.float64)
    right = torch.randn(4, 6, generator=g, dtype=torch.float64)
    W, undetermined = solve_symmetric(X.T @ X, right, 1e-14, 1e-14)
    assert undetermined == 0
    assert error_ratio(W @ (X.T @ X), right) < 1e-9
    X = torch.randn(4, 6, generator=g, dtype=torch.float64)
    W, undetermined = solve_symmetric(X.T @ X, right @ X.T @ X[:, :6], 1e-12, 1e-12)
    assert undetermined == 2
    assert error_ratio(W @ (X.T @ X), right @ X.T @ X) < 1e-9
    assert solve_symmetric(torch.zeros(3, 3, dtype=torch.float64), right[:, :3], 0.0, 0.0)[1] == 3


@pytest.mark.parametrize("options", [{}, {"lambda_source": None}, {"target": "full"}, {"coefficients": [0.5, 2.0]}])
def test_the_objective_of_any_merge(options):
    problem = Problem()
    solution = solve(problem, iterations=2, **options)
    arguments = problem.model, problem.adapters, problem.samples
    assert iteris.objective(*arguments, solution.updates, **options) == solution.module_objectives[-1]
    in_parts = iteris.objective(*arguments, solution.adapter(9).adapter, max_memory=4000, **options)
    assert in_parts == pytest.approx(solution.module_objectives[-1], rel=1e-3)
    worse = iteris.objective(*arguments, lk.merge(problem.adapters), **options)
    assert sum(worse.values()) > solution.objectives[-1]
    nothing = iteris.objective(*arguments, {}, **options)
    assert sum(nothing.values()) > solution.objectives[-1]
    for bad, says in (
        ({"1": torch.ones(9, 7)}, "targeted by no adapter"),
        ({"0": torch.ones(7, 9)}, r"shape \(9, 7\)"),
    ):
        with pytest.raises(lk.LorakernError, match=says):
            iteris.objective(*arguments, bad, **options)
    with pytest.raises(lk.LorakernError, match="merged must be"):
        iteris.objective(*arguments, None, **options)


def test_an_alpha_below_the_rounding_is_reported():
    problem = Problem(sizes=(60, 5), tokens=(9,))
    tiny = solve(problem, iterations=1, alpha=1e-15)
    assert tiny.undetermined == {"0": 42}
    none = solve(problem, iterations=1, alpha=0.0)
    assert error_ratio(tiny.updates["0"], none.updates["0"]) < 1e-3


def test_nothing_runs_after_the_last_layer_that_is_wanted():
    problem, runs = Problem(), []
    problem.adapters = [{name: a[name] for name in ("0", "2")} for a in problem.adapters]
    for name in "34":
        problem.model.get_submodule(name).register_forward_pre_hook(lambda *_: runs.append(1))
    solve(problem, iterations=2)
    assert len(runs) == 2, "only the forward that finds the layers runs to its end"


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("where", ["nowhere", "task", "merged"])
def test_the_model_is_left_alone_also_by_an_interrupt(where):
    problem = Problem()
    model = problem.model.train()
    model[1].eval()
    runs, limit = [], {"nowhere": 10**9, "task": 6, "merged": 14}[where]

    def count(module, inputs):
        runs.append(module.training)
        if len(runs) == limit:
            raise Interrupt

    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    handle = model[3].register_forward_pre_hook(count)
    if where == "nowhere":
        solve(problem, iterations=2)
    else:
        with pytest.raises(Interrupt):
            solve(problem, iterations=2)
        assert len(runs) == limit
    assert not any(runs)
    handle.remove()
    for name, parameter in model.named_parameters():
        kept, address, bits = before[name]
        assert parameter is kept and parameter.data_ptr() == address and torch.equal(parameter, bits)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fold_adds_to_the_weights_and_the_adapter_keeps_what_it_says():
    problem = Problem()
    solution = solve(problem, iterations=2)
    folded = copy.deepcopy(problem.model)
    assert solution.fold(folded) is folded
    x = torch.randn(3, 7)
    whole, energy = solution.adapter(99)
    assert all(share == pytest.approx(1.0) for share in energy.values())
    served = lk.integrations.transformers.attach(problem.model, {"merged": whole})
    with served.use(["merged"]):
        assert torch.allclose(problem.model(x), folded(x), atol=1e-4)
    served.detach()
    adapter, energy = solution.adapter(2)
    for name in problem.names:
        exact = solution.updates[name].double()
        lost = (exact - update(adapter[name])).square().sum() / exact.square().sum()
        assert adapter[name].rank == 2 and 1 - energy[name] == pytest.approx(float(lost), rel=1e-3)
    by_share, energy = solution.adapter(0.8)
    assert all(share >= 0.8 for share in energy.values())
    assert all(solution.adapter(by_share[n].rank - 1)[1][n] < 0.8 for n in problem.names if by_share[n].rank > 1)
    with pytest.raises(lk.LorakernError, match="rank must be"):
        solution.adapter(True)


def test_fold_changes_nothing_where_it_cannot_change_all():
    problem = Problem()
    solution = solve(problem, iterations=1)
    for other in (Problem(sizes=(7, 9, 8, 6, 4)).model, torch.nn.Sequential(torch.nn.Linear(7, 9))):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(lk.LorakernError, match=r"fold: module '.'"):
            solution.fold(other)
        assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    problem.model.register_module("tied", copy.copy(problem.model[0]))
    problem.model.tied.weight = problem.model[0].weight
    with pytest.raises(lk.LorakernError, match="its weight is that of"):
        solution.fold(problem.model)
