"""LoRA Soups: the gated model against merged adapters and dense formulas, and what learning does."""

from types import SimpleNamespace

import merging
import merging_strategies
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import update
from problems import error_ratio
from tiny_models import FEW, adapter, assert_unchanged, batches, gpt2, llama, logits, snapshot, teacher_batches, three

import lorakern as lk
from lorakern.integrations.gated import GatedModel
from lorakern.integrations.transformers import attach
from lorakern.merge import soups
from lorakern.merge.inputs import checked_adapters


def dense_logits(model, adapters, modules, gates, ids):
    """The same by dense weights W + sum_i gates[m, i] s_i B_i A_i; autograd follows the gates."""
    weights = {}
    for m, module in enumerate(modules):
        dense = model.get_submodule(module).weight.detach()
        for i, factors in enumerate(adapters):
            if module in factors:
                delta = gates[m, i] * update(factors[module]).to(dense.dtype)
                dense = dense + (delta if isinstance(model.get_submodule(module), torch.nn.Linear) else delta.T)
        weights[f"{module}.weight"] = dense
    return torch.func.functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False}).logits


@pytest.mark.parametrize("seed", range(3))
def test_fixed_gates_are_the_cat_merge(seed):
    model = llama(seed)
    adapters = three(model)
    with GatedModel("test", model, adapters) as gated:
        g = torch.Generator().manual_seed(seed)
        gated.gates = torch.randn(gated.held.shape, generator=g)
        ours = logits(model, batches()[0])
    weights = dict(zip(gated.modules, gated.gates.tolist(), strict=True))
    merged = lk.merge(adapters, method="cat", per_module=lambda module: {"weights": weights[module]})
    with attach(model, {"merged": merged}).use(["merged"]):
        theirs = logits(model, batches()[0])
    assert error_ratio(ours, theirs) < 1e-5
    assert error_ratio(ours, logits(model, batches()[0])) > 1e-2


@given(merging_strategies.adapters(), st.integers(0, 99))
def test_every_layer_adds_the_cat_merge_whatever_the_ranks_scales_and_dtypes(adapters, seed):
    g = torch.Generator().manual_seed(seed)
    layers = {name: torch.nn.Linear(d_in, d_out) for name, (d_out, d_in) in merging.SHAPES.items()}
    with GatedModel("test", torch.nn.ModuleDict(layers), checked_adapters(adapters)) as gated:
        gated.gates = torch.randn(gated.held.shape, generator=g)
        for module, gates in zip(gated.modules, gated.gates.tolist(), strict=True):
            x = torch.randn(2, 3, layers[module].in_features, generator=g)
            base = torch.nn.functional.linear(x, layers[module].weight, layers[module].bias)
            delta = x.double() @ merging.total(adapters, gates, module).T
            # roundings are relative to the terms, which may cancel in the sum
            largest = max(update(a[module]).abs().amax() for a in adapters if module in a)
            allowed = 1e-5 * (base.abs().amax() + delta.abs().amax() + 10 * largest)
            assert (layers[module](x).double() - base.double() - delta).abs().amax() < allowed


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_gradients_are_those_of_dense_weights(build, dtype, tolerance):
    exact, model = build(dtype=torch.float64), build(dtype=dtype)
    adapters, ids = three(model), batches(length=9)[0]["input_ids"]
    backend = "reference" if dtype == torch.float64 else "cpu"
    with GatedModel("test", model, adapters) as gated, lk.use_backend(backend):
        gates = torch.linspace(-1, 1.5, gated.held.numel(), dtype=dtype).view(gated.held.shape).requires_grad_()
        gated.gates = gates
        direction = torch.randn(*ids.shape, 61, generator=torch.Generator().manual_seed(0))
        (model(input_ids=ids, use_cache=False).logits * direction.to(dtype)).sum().backward()
    wanted = gates.detach().double().requires_grad_()
    (dense_logits(exact, adapters, gated.modules, wanted, ids) * direction.double()).sum().backward()
    assert error_ratio(gates.grad, wanted.grad) < tolerance
    assert not gates.grad[~gated.held].any() and wanted.grad[gated.held].all()


def test_under_autocast_the_gradient_is_that_of_autocast_within_its_precision():
    model, ids = llama(), batches()[0]["input_ids"]
    grads = []
    with GatedModel("test", model, three(model)) as gated:
        for enabled in (False, True):
            gated.gates = gates = torch.full(gated.held.shape, 0.5, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            grads.append(gates.grad)
    assert not torch.equal(*grads) and error_ratio(*grads) < 5e-2


def test_nothing_but_the_gates_gets_a_gradient_and_no_activation_is_kept_for_A_and_B():
    model = llama()
    kept = []
    with GatedModel("test", model, [adapter(model, 2), adapter(model, 3)]) as gated:
        gated.gates = torch.ones(gated.held.shape, requires_grad=True)
        layer = gated._layers[gated.modules[0]][1]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(**batches()[0], labels=batches()[0]["input_ids"], use_cache=False).loss
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters()) and layer.A.grad is None
    assert not any(t.data_ptr() == layer.A.data_ptr() or t.data_ptr() == layer.B.data_ptr() for t in kept)
    assert gated.gates.grad.all()


def test_one_adapter_under_softmax_comes_back_bit_for_bit():
    model = llama()
    alone = adapter(model, 4, 0.5)
    soup = soups.learn(model, [alone], batches(), lr=0.5, warmup=0, init=3)
    assert all(torch.equal(weights, torch.ones(1)) for weights in soup.weights.values())
    for module, (A, B, scale) in soup.merged.items():
        assert torch.equal(A, alone[module].A) and torch.equal(B, alone[module].B) and scale == 0.5


def test_equal_adapters_under_softmax_come_back():
    model = llama()
    same = adapter(model, 4, 0.5)
    soup = soups.learn(model, [same, same, same], batches(), lr=0.5, warmup=0, init=3)
    for module, factors in soup.merged.items():
        assert factors.rank == 12
        assert error_ratio(update(factors), update(same[module])) < 1e-6
        assert error_ratio(update(soup.adapter(rank=4)[module]), update(same[module])) < 1e-5


@pytest.mark.parametrize("parametrisation", soups.PARAMETRISATIONS)
def test_the_helpful_adapter_gains_weight_and_the_loss_falls(parametrisation):
    model = llama()
    # surer of its predictions than a random model is
    model.lm_head.weight.data *= 20
    helps, hurts = adapter(model, 4, 1.0, seed=1), adapter(model, 4, 1.0, seed=2)
    data = teacher_batches(model, helps)
    options = {"parametrisation": parametrisation, "init": [0.5, 0.5], "lr": 0.05, "epochs": 5, "warmup": 2}
    soup = soups.learn(model, [helps, hurts], data, **options)
    assert len(soup.losses) == 30
    assert sum(soup.losses[-6:]) < 0.8 * sum(soup.losses[:6])
    gain = torch.stack(list(soup.weights.values())).mean(0) - 0.5
    assert gain[0] > 0.1 and gain[1] < -0.1


def test_an_adapter_has_no_weight_where_it_lacks_a_module():
    model = llama()
    adapters = three(model)
    soup = soups.learn(model, adapters, batches(), lr=0.1, warmup=0)
    for module, weights in soup.weights.items():
        held = torch.tensor([module in factors for factors in adapters])
        assert not weights[~held].any() and weights[held].all()
        assert weights.sum().item() == pytest.approx(1)
        total = sum(w * update(a[module]) for w, a in zip(weights.tolist(), adapters, strict=True) if module in a)
        assert error_ratio(update(soup.merged[module]), total) < 1e-6
    assert soup.weights.keys() == soup.merged.keys() == adapters[0].keys()


@pytest.mark.parametrize("init", ["zero", 7])
def test_the_same_seed_gives_the_same_bits(init):
    model = llama()
    texts = [[4, 5, 6], [7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17], [18, 19, 20]]
    data = [" ".join(map(str, ids)) for ids in texts]

    def run(seed, init=init):
        options = {"tokenizer": numbers, "batch_size": 2, "epochs": 2, "lr": 0.1, "warmup": 1}
        soup = soups.learn(model, three(model), data, seed=seed, init=init, **options)
        return torch.stack(list(soup.weights.values())), soup.losses

    weights, losses = run(0)
    again, same = run(0)
    assert torch.equal(weights, again) and losses == same and len(losses) == 6
    assert run(1)[1] != losses
    assert run(0, init=8)[1] != losses


def numbers(text, add_special_tokens=True):
    """A tokenizer of numbers: each is its own token."""
    return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}


def test_init_from_a_seed_is_normal_and_a_modules_own():
    model = llama()
    wide, few = [adapter(model, 2)] * 40, [adapter(model, 2, targets=FEW)] * 40
    start = {name: w for name, w in soups.learn(model, wide, batches(1), init=5, lr=1e-12).weights.items()}
    also = soups.learn(model, few, batches(1), init=5, lr=1e-12).weights
    assert also.keys() < start.keys()
    assert all(torch.allclose(also[name], start[name], atol=1e-7) for name in also)
    theta = torch.stack(list(start.values())).log()
    assert (theta - theta.mean(1, keepdim=True)).std().item() == pytest.approx(1, abs=0.15)


def test_the_result_works_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    soup = soups.learn(model, three(model), batches(), parametrisation="free", init=[0.5, -0.25, 1.0], lr=0.05)
    soup.merged.save(tmp_path / "soup")
    with GatedModel("test", model, soup.adapters) as gated:
        gated.gates = torch.stack([soup.weights[module] for module in gated.modules])
        ours = logits(model, batches()[0])
    theirs = logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "soup").eval(), batches()[0])
    assert error_ratio(theirs, ours) < 1e-5
    assert error_ratio(logits(llama(), batches()[0]), ours) > 1e-2


def stop(step, total, loss):
    raise KeyboardInterrupt


@pytest.mark.parametrize("progress, raised", [(None, None), (stop, KeyboardInterrupt)])
def test_the_model_stays_as_it_was(progress, raised):
    model = llama().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    with torch.no_grad():
        if raised:
            with pytest.raises(raised):
                soups.learn(model, three(model), batches(), progress=progress)
        else:
            soups.learn(model, three(model), batches(), progress=progress)
    assert_unchanged(model, before)


def test_progress_and_the_learning_rate_over_warm_up_and_fall(monkeypatch):
    model, steps, rates = llama(), [], []
    step = torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    options = {"lr": 0.4, "warmup": 2, "progress": lambda *told: steps.append(told)}
    soup = soups.learn(model, three(model), batches(6), **options)
    assert [(step, total) for step, total, _ in steps] == [(k, 6) for k in range(1, 7)]
    assert tuple(loss for *_, loss in steps) == soup.losses
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])


class NotFinite(torch.nn.Module):
    """A model whose loss, or the gradient of its loss, is NaN in one call."""

    def __init__(self, model, call, what):
        super().__init__()
        self.inner, self.call, self.what, self.calls = model, call, what, 0

    def forward(self, **batch):
        loss = self.inner(**batch).loss
        self.calls += 1
        if self.calls == self.call:
            # the gradient of the root of 0 times a constant is infinity times 0
            loss = loss * torch.nan if self.what == "loss" else loss + (loss * 0).sqrt()
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("what, call, steps", [("loss", 3, 1), ("gradient", 3, 2), ("loss", 1, 0)])
def test_a_loss_or_gradient_that_is_not_finite_stops_it_and_keeps_the_last_good_weights(what, call, steps):
    model, options = llama(), {"lr": 0.1, "warmup": 100}
    wrapped = NotFinite(model, call, what)
    before = snapshot(wrapped)
    with pytest.raises(lk.LorakernError, match=f"{what} is not finite at step {call} of 4") as caught:
        soups.learn(wrapped, three(model), batches(4), **options)
    soup = caught.value.soup
    assert_unchanged(wrapped, before)
    whole = soups.learn(model, three(model), batches(4), **options)
    assert soup.losses == whole.losses[: call - 1]
    # tokenised batches keep their order, and the warm-up is longer than all steps
    weights = soups.learn(model, three(model), batches(steps), **options).weights if steps else None
    for module, last in soup.weights.items():
        held = torch.tensor([module in factors for factors in soup.adapters]).float()
        assert torch.equal(last, weights[module] if steps else held / held.sum())
    assert soup.merged.keys() == soup.weights.keys()


BAD = {
    "parametrisation": ("hard", "parametrisation must be one of softmax, free"),
    "init": ([1.0, 2.0], "init must be 'zero', an integer as a seed, or a list of 3 numbers"),
    "lr": (0, "lr must be a positive number"),
    "epochs": (0, "epochs must be an integer of at least 1"),
    "batch_size": (1.5, "batch_size must be an integer of at least 1"),
    "warmup": (-1, "warmup must be an integer of at least 0"),
    "cutoff": (1, "cutoff must be an integer of at least 2"),
    "seed": ("x", "seed must be an integer"),
    "data": ([], "data is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_before_anything_runs(name):
    model = llama()
    before, (value, message) = snapshot(model), BAD[name]
    options = {"data": batches(), name: value, "progress": pytest.fail}
    data = options.pop("data")
    with pytest.raises(lk.LorakernError, match=message):
        soups.learn(model, three(model), data, **options)
    assert_unchanged(model, before)


def misfits(model):
    fits = adapter(model, 2)
    one = dict(fits)
    module = next(iter(one))
    A, B, scale = one[module]
    short = module.removeprefix("model.")
    named = (lk.LoraAdapter(fits, base_model_name_or_path=name) for name in "ab")
    return {
        "no such module": [fits, {**one, "model.layers.9.self_attn.q_proj": one[module]}],
        "do not fit the layer": [{module: (torch.ones(2, 5), B, scale)}],
        "their base models differ": [fits, {**one, module: (torch.ones(2, 5), B, scale)}],
        "holds NaN or infinity": [fits, {**one, module: (A * torch.nan, B, scale)}],
        "that another adapter calls": [fits, {short: one[module]}],
        "has no modules": [fits, {}],
        "adapters must be a list": fits,
        "base_model_name_or_path is 'a'": list(named),
    }


@pytest.mark.parametrize("message", misfits(llama()))
def test_adapters_that_do_not_fit_are_refused(message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(lk.LorakernError, match=message):
        soups.learn(model, misfits(model)[message], batches())
    assert_unchanged(model, before)


def test_a_base_model_name_can_be_given():
    model = llama()
    adapters = misfits(model)["base_model_name_or_path is 'a'"]
    soup = soups.learn(model, adapters, batches(1), base_model_name_or_path="c")
    assert soup.merged.config.base_model_name_or_path == "c"


@pytest.mark.parametrize("returned", [None, 1.5, torch.ones(2)])
def test_a_model_without_a_loss_is_refused(returned):
    model = llama()
    model.register_forward_hook(lambda *_: SimpleNamespace(loss=returned))
    with pytest.raises(lk.LorakernError, match="must return an object with a loss"):
        soups.learn(model, three(model), batches())


def test_a_model_that_does_not_run_the_targeted_layers_is_refused():
    model = llama()
    model.spare = torch.nn.Linear(4, 4)
    with pytest.raises(lk.LorakernError, match="does not depend on any targeted layer"):
        soups.learn(model, [{"spare": (torch.ones(2, 4), torch.ones(4, 2), 1.0)}], batches())


def test_a_model_that_is_none_is_refused():
    with pytest.raises(lk.LorakernError, match=r"model must be a torch.nn.Module; got str"):
        soups.learn("llama", three(llama()), batches())


def test_plain_tuples_and_a_layer_of_the_other_layout():
    model, name = gpt2(), "transformer.h.1.attn.c_attn"
    adapters = [{name: (torch.randn(r, 32) * 0.2, torch.randn(96, r) * 0.2, 1.0)} for r in (2, 5)]
    soup = soups.learn(model, adapters, batches(), lr=0.1, warmup=0)
    with attach(model, {"soup": soup.merged}).use(["soup"]):
        merged = logits(model, batches()[0])
    with GatedModel("test", model, soup.adapters) as gated:
        gated.gates = soup.weights[name][None]
        assert error_ratio(logits(model, batches()[0]), merged) < 1e-5
