"""LoraHub: candidates scored through gates against rebuilt adapters, and what the search does with them."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import error_ratio
from tiny_models import adapter, assert_unchanged, batches, llama, logits, snapshot, teacher_batches, three

import lorakern as lk
from lorakern.integrations.gated import GatedModel
from lorakern.integrations.transformers import attach
from lorakern.merge import lorahub

WEIGHTS = [0.7, -0.4, 1.3]


@pytest.mark.parametrize("combine", lorahub.COMBINATIONS)
@pytest.mark.parametrize("weights", [WEIGHTS, [0.0, 1.5, 0.0]])
def test_a_candidate_is_the_merged_adapter(combine, weights):
    model = llama()
    adapters, batch = three(model), batches()[0]
    with GatedModel("test", model, adapters) as gated, torch.no_grad():
        gated.crossed = combine == "lorahub_linear"
        gated.gates = torch.tensor(weights).expand(gated.held.shape)
        ours = logits(model, batch)
    with attach(model, {"merged": lk.merge(adapters, combine, weights=weights)}).use(["merged"]):
        theirs = logits(model, batch)
    assert error_ratio(ours, theirs) < 1e-5
    assert error_ratio(ours, logits(model, batch)) > 1e-2


def test_crossed_gates_refuse_a_gradient():
    model = llama()
    with GatedModel("test", model, three(model)) as gated:
        gated.crossed, gated.gates = True, torch.ones(gated.held.shape, requires_grad=True)
        loss = model(**batches()[0], labels=batches()[0]["input_ids"], use_cache=False).loss
        with pytest.raises(lk.LorakernError, match="no gradient"):
            loss.backward()


@pytest.mark.parametrize("combine", lorahub.COMBINATIONS)
def test_the_score_is_the_mean_loss_of_all_tokens_and_the_l1_term(combine):
    model, short = llama(), {"input_ids": torch.tensor([[3, 4, 5]])}
    adapters, data = three(model), [batches()[0], short]

    def one(objective, start, *, bound, budget, seed):
        assert (start, bound, budget, seed) == ([0.0] * 3, 1.5, 40, 9)
        objective(WEIGHTS)
        return WEIGHTS

    hub = lorahub.search(model, adapters, data, combine=combine, optimizer=one, seed=9, l1=0.3)
    with attach(model, {"merged": hub.adapter()}).use(["merged"]):
        loss = torch.cat(
            [
                torch.nn.functional.cross_entropy(
                    logits(model, batch)[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
                )
                for batch in data
            ]
        )
    assert hub.score == pytest.approx(loss.mean().item() + 0.3 * (0.7 + 0.4 + 1.3) / 3, rel=1e-5)
    assert hub.trace == ((tuple(WEIGHTS), hub.score),)
    assert {factors.rank for factors in hub.adapter(rank=1).values()} == {1}


@pytest.mark.parametrize("combine", lorahub.COMBINATIONS)
def test_the_search_finds_the_adapter_that_helps(combine):
    model = llama()
    # surer of its predictions than a random model is
    model.lm_head.weight.data *= 20
    helps, hurts = adapter(model, 4, 1.0, seed=1), adapter(model, 4, 1.0, seed=2)
    data, before, told = teacher_batches(model, helps), snapshot(model), []
    hub = lorahub.search(
        model, [hurts, helps], data, combine=combine, budget=60, progress=lambda *step: told.append(step)
    )
    assert_unchanged(model, before)
    assert [step[:2] for step in told] == [(k, 60) for k in range(1, 61)]
    assert hub.score == min(score for _, score in hub.trace) < 0.8 * hub.trace[0][1]
    assert abs(hub.weights[1]) > 0.5 > abs(hub.weights[0])
    again = lorahub.search(model, [hurts, helps], data, combine=combine, budget=60)
    assert again.trace == hub.trace
    assert lorahub.search(model, [hurts, helps], data, combine=combine, budget=3, seed=1).trace != hub.trace[:3]


@pytest.mark.parametrize("seed", range(3))
def test_the_evolution_strategy_keeps_to_bound_and_budget_and_finds_a_minimum_on_the_edge(seed):
    tried = []

    def objective(weights):
        tried.append(weights)
        return sum((w - goal) ** 2 for w, goal in zip(weights, (0.5, 4.0, -1.0), strict=True))

    found = lorahub.one_plus_one(objective, [0.0] * 3, bound=1.5, budget=300, seed=seed)
    assert len(tried) == 300 and max(abs(w) for weights in tried for w in weights) <= 1.5
    assert found == pytest.approx([0.5, 1.5, -1.0], abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_generations_keep_to_bound_and_budget_and_find_a_minimum_on_the_edge(seed):
    tried = []

    def many(candidates):
        tried.append(candidates)
        return [sum((w - goal) ** 2 for w, goal in zip(c, (0.5, 4.0, -1.0), strict=True)) for c in candidates]

    found = lorahub.evolution(SimpleNamespace(many=many), [0.0] * 3, bound=1.5, budget=301, seed=seed)
    assert [len(candidates) for candidates in tried] == [8] * 37 + [5] and tried[0][0] == [0.0] * 3
    assert max(abs(w) for candidates in tried for weights in candidates for w in weights) <= 1.5
    assert found == pytest.approx([0.5, 1.5, -1.0], abs=0.02)


@pytest.mark.parametrize("combine", lorahub.COMBINATIONS)
@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_candidates_at_once_have_the_scores_that_they_have_alone(combine, tokens, monkeypatch):
    monkeypatch.setattr(lorahub, "TOKENS", tokens)
    model, calls = llama(), []
    data = [
        *batches(2),
        {"input_ids": [[3, 4, 5, 6]], "attention_mask": [[1, 1, 1, 0]], "labels": [[-100, -100, 5, -100]]},
    ]
    candidates = [[0.3 * k, -0.2, 0.1 * k - 0.5] for k in range(5)]

    def optimizer(objective, start, *, bound, budget, seed):
        scores = objective.many(candidates) if seed else [objective(weights) for weights in candidates]
        return candidates[scores.index(min(scores))]

    model.register_forward_hook(lambda module, inputs, output: calls.append(output.logits.shape[0]))
    options = {"combine": combine, "optimizer": optimizer, "budget": 5}
    together, apart = (lorahub.search(model, three(model), data, seed=seed, **options) for seed in (1, 0))
    assert [weights for weights, _ in together.trace] == [weights for weights, _ in apart.trace]
    assert [s for _, s in together.trace] == pytest.approx([s for _, s in apart.trace], rel=1e-5)
    at_once = {1: 15, 40: 3 + 3 + 1, 10_000: 3}[tokens]
    assert len(calls) == at_once + 15


def test_a_model_with_a_loss_of_its_own_is_asked_for_it():
    model = llama()
    model.loss_function = lambda logits, labels, vocab_size, **options: logits.square().mean()
    hub = lorahub.search(model, three(model), batches(1), budget=9)
    with attach(model, {"merged": hub.adapter()}).use(["merged"]):
        want = logits(model, batches(1)[0]).square().mean().item()
    assert hub.score == pytest.approx(want + 0.05 * sum(map(abs, hub.weights)) / 3, rel=1e-4)


def fixed(*candidates, result=None):
    def optimizer(objective, start, *, bound, budget, seed):
        for candidate in candidates:
            objective(candidate)
        return candidates[-1] if result is None else result

    return optimizer


BAD = {
    "combine": ("ties", "combine must be one of lorahub_linear, cat"),
    "budget": (0, "budget must be an integer of at least 1"),
    "bound": (0.0, "bound must be a positive number"),
    "l1": (-1, "l1 must be a positive number or 0"),
    "seed": (0.5, "seed must be an integer"),
    "optimizer": ("ES", "optimizer must be a function"),
    "data": ([], "lorahub: data is empty"),
}
OPTIMIZERS = {
    "none of its candidates": fixed(WEIGHTS, result=[0.0] * 3),
    "outside of the bound": fixed([0.0, 0.0, 2.0]),
    "must be 3 finite numbers": fixed([0.0]),
    "candidate of the optimizer must be": fixed([0.0, math.nan, 0.0]),
    "more than the budget of 40": fixed(*[WEIGHTS] * 41),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    model, (value, message) = llama(), BAD[name]
    options = {"data": batches(), name: value}
    data = options.pop("data")
    with pytest.raises(lk.LorakernError, match=message):
        lorahub.search(model, three(model), data, **options)


@pytest.mark.parametrize("message", OPTIMIZERS)
def test_a_bad_optimizer_is_refused_and_the_model_stays_as_it_was(message):
    model = llama().train()
    before = snapshot(model)
    with pytest.raises(lk.LorakernError, match=message):
        lorahub.search(model, three(model), batches(), optimizer=OPTIMIZERS[message])
    assert_unchanged(model, before)


def test_candidates_without_a_finite_loss_lose_and_if_all_do_it_is_an_error():
    model = llama()
    adapters = three(model)
    scores = iter([3.0, math.nan, 2.0, math.inf])

    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **batch):
            return SimpleNamespace(loss=torch.tensor(next(scores)))

    hub = lorahub.search(Scripted(), adapters, batches(1), budget=4, l1=0)
    assert [score for _, score in hub.trace] == [3.0, math.inf, 2.0, math.inf] and hub.weights == hub.trace[2][0]
    scores = iter([math.nan] * 3)
    with pytest.raises(lk.LorakernError, match="not finite at the best of 3 candidates"):
        lorahub.search(Scripted(), adapters, batches(1), budget=3)


def test_nevergrad_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    model = llama()
    with pytest.raises(lk.LorakernError, match=r"pip install nevergrad.*evolution"):
        lorahub.search(model, three(model), batches(), optimizer=lorahub.nevergrad)


def test_what_nevergrad_is_given(monkeypatch):
    """Against its interface alone: the package itself is tested where it is installed, below."""
    given = {}

    class NGOpt:
        def __init__(self, parametrization, budget):
            given.update(space=parametrization, budget=budget)

        def minimize(self, function):
            given["scores"] = [function(np.array([x, 0.0, 1.0])) for x in (0.5, -0.5)]

    seeded = SimpleNamespace(seed=lambda seed: given.update(seed=seed))
    module = SimpleNamespace(
        p=SimpleNamespace(Array=lambda **space: SimpleNamespace(**space, random_state=seeded)),
        optimizers=SimpleNamespace(registry={"NGOpt": NGOpt}),
    )
    monkeypatch.setitem(sys.modules, "nevergrad", module)
    model = llama()
    hub = lorahub.search(model, three(model), batches(), optimizer=lorahub.nevergrad, budget=2, seed=4)
    assert (given["space"].init, given["space"].lower, given["space"].upper) == ([0.0] * 3, [-1.5] * 3, [1.5] * 3)
    assert (given["budget"], given["seed"], hub.score) == (2, 4, min(given["scores"]))


def test_nevergrad_finds_a_minimum():
    pytest.importorskip("nevergrad")
    found = lorahub.nevergrad(lambda w: (w[0] - 1) ** 2 + w[1] ** 2, [0.0, 0.0], bound=1.5, budget=200, seed=0)
    assert found == pytest.approx([1.0, 0.0], abs=0.1)
