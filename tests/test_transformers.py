"""lorakern.integrations.transformers against PEFT with the same saved adapters, on models built from a config."""

import contextvars
import copy
import threading

import pytest
import torch
from problems import error_ratio

import lorakern as lk
from lorakern.integrations.transformers import attach

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RECIPES = {
    "llama": {
        "poet": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "math": {"r": 12, "lora_alpha": 6, "target_modules": "all-linear"},
        "code": {
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3},
        },
    },
    "gpt2": {
        "poet": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "math": {"r": 12, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
        "code": {"r": 8, "lora_alpha": 16, "target_modules": ["c_fc"], "fan_in_fan_out": True},
    },
}
NAMES = ["poet", "math", "code"]
MIXED = ["math", None, "poet", "code", "poet"]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(family):
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Case:
    """A model, its adapters on disk, and PEFT on a copy of the model."""

    def __init__(self, family, folder):
        self.model = build(family)
        self.adapters, self.peft = {}, None
        for seed, (name, recipe) in enumerate(RECIPES[family].items()):
            torch.manual_seed(seed + 1)
            trained = peft.get_peft_model(build(family), peft.LoraConfig(task_type="CAUSAL_LM", **recipe))
            for parameter in (p for key, p in trained.named_parameters() if "lora_" in key):
                torch.nn.init.normal_(parameter, std=0.3)
            trained.save_pretrained(folder / name)
            self.adapters[name] = lk.LoraAdapter.load(folder / name)
            if self.peft is None:
                self.peft = peft.PeftModel.from_pretrained(build(family), folder / name, adapter_name=name)
            else:
                self.peft.load_adapter(folder / name, adapter_name=name)
        self.peft.eval()
        self.ids = torch.randint(2, 97, (len(MIXED), 7), generator=torch.Generator().manual_seed(9))

    def alone(self, name, run):
        """What run(model) returns under PEFT with one adapter."""
        if name is None:
            with self.peft.disable_adapter():
                return run(self.peft)
        self.peft.set_adapter(name)
        return run(self.peft)

    def attach(self, names=NAMES, **options):
        return attach(self.model, {name: self.adapters[name] for name in names}, **options)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def shared_case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def case(shared_case):
    """The shared case; whatever a test attached is checked to be gone without a trace."""
    before = {name: tensor.clone() for name, tensor in shared_case.model.state_dict().items()}
    types = [type(module) for module in shared_case.model.modules()]
    yield shared_case
    for module in shared_case.model.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks.clear()
    after = shared_case.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in shared_case.model.modules()] == types


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def greedy(model, ids, **options):
    return model.generate(input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def hooks(model):
    return [len(module._forward_hooks) for module in model.modules()]


def test_each_adapter_equals_peft(case):
    lk_model = case.attach()
    for name in (None, *NAMES):
        want = case.alone(name, lambda model: logits(model, case.ids))
        with lk_model.use([name] * len(case.ids)):
            torch.testing.assert_close(logits(case.model, case.ids), want, rtol=1e-5, atol=1e-5)


def test_adapters_change_the_logits_and_differ(case):
    lk_model = case.attach()
    with lk_model.use([None, *NAMES]):
        rows = logits(case.model, case.ids[:1].expand(4, -1))
    for i in range(4):
        for j in range(i):
            assert (rows[i] - rows[j]).abs().max() > 1e-2


def test_mixed_rows_equal_rows_alone_and_peft(case):
    lk_model = case.attach()
    with lk_model.use(MIXED):
        mixed = logits(case.model, case.ids)
    for row, name in enumerate(MIXED):
        ids = case.ids[row : row + 1]
        with lk_model.use([name]):
            torch.testing.assert_close(mixed[row : row + 1], logits(case.model, ids), rtol=1e-5, atol=1e-5)
        want = case.alone(name, lambda model, ids=ids: logits(model, ids))
        torch.testing.assert_close(mixed[row : row + 1], want, rtol=1e-5, atol=1e-5)


def test_rows_of_mixtures_equal_the_merged_adapters_and_rows_alone(case):
    rows = [{"poet": 0.5, "math": 0.25}, "code", None, {"math": -1.5}, {name: 1 / 3 for name in NAMES}]
    lk_model = case.attach()
    lk_model.add("sum", lk.merge([case.adapters["poet"], case.adapters["math"]], "cat", weights=[0.5, 0.25]))
    lk_model.add("mean", lk.merge([case.adapters[name] for name in NAMES], "cat", weights=[1 / 3] * 3))
    lk_model.add("minus", lk.merge([case.adapters["math"]], "cat", weights=[-1.5]))
    with lk_model.use(["sum", "code", None, "minus", "mean"]):
        want = logits(case.model, case.ids)
    with lk_model.use(rows):
        mixed = logits(case.model, case.ids)
        with pytest.raises(lk.LorakernError, match="'math' is in use"):
            lk_model.remove("math")
    torch.testing.assert_close(mixed, want, rtol=1e-5, atol=1e-5)
    for i, row in enumerate(rows):
        with lk_model.use([row]):
            alone = logits(case.model, case.ids[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    lk_model.remove("math")


def test_weights_of_mixtures_are_checked(case):
    lk_model = case.attach()
    for row, message in (
        ({"poet": float("nan")}, "weight of adapter 'poet' must be a finite number; got nan"),
        ({"poet": "1"}, "must be a finite number; got '1'"),
        ({"poet": True}, "must be a finite number"),
        ({"nobody": 1.0}, "no adapter 'nobody'"),
        ({3: 1.0}, "no adapter 3"),
    ):
        with pytest.raises(lk.LorakernError, match=message), lk_model.use([row]):
            pass
    with lk_model.use([{}] * len(case.ids)):
        empty = logits(case.model, case.ids)
    assert torch.equal(empty, logits(case.model, case.ids))


def test_generate_equals_peft_rows_alone(case):
    lk_model = case.attach()
    with lk_model.use(MIXED):
        mixed = greedy(case.model, case.ids)
    for row, name in enumerate(MIXED):
        ids = case.ids[row : row + 1]
        want = case.alone(name, lambda model, ids=ids: greedy(model, ids))
        assert mixed[row].tolist() == want[0].tolist()


def test_outside_of_use_the_model_is_the_base_bit_for_bit(case):
    want = logits(case.model, case.ids)
    lk_model = case.attach()
    assert torch.equal(logits(case.model, case.ids), want)
    with lk_model.use(MIXED):
        assert not torch.equal(logits(case.model, case.ids), want)
    assert torch.equal(logits(case.model, case.ids), want)
    with lk_model.use([None] * len(MIXED)):
        assert torch.equal(logits(case.model, case.ids), want)
    lk_model.detach()
    assert torch.equal(logits(case.model, case.ids), want)


def test_detach_restores_the_modules(case):
    before, forwards = hooks(case.model), [module.__dict__.keys() for module in case.model.modules()]
    lk_model = case.attach()
    assert hooks(case.model) != before
    lk_model.detach()
    lk_model.detach()
    assert hooks(case.model) == before
    assert [module.__dict__.keys() for module in case.model.modules()] == forwards
    with pytest.raises(lk.LorakernError, match="was detached"), lk_model.use([None]):
        pass
    with pytest.raises(lk.LorakernError, match="was detached"):
        lk_model.add("poet", case.adapters["poet"])


def test_the_block_ends_when_it_raises(case):
    lk_model = case.attach()
    want = logits(case.model, case.ids)
    with pytest.raises(KeyError), lk_model.use(MIXED):
        raise KeyError
    assert torch.equal(logits(case.model, case.ids), want)
    lk_model.remove("poet")


@pytest.mark.parametrize("beams, sequences", [(3, 1), (3, 2)])
def test_beams_and_return_sequences_repeat_rows(case, beams, sequences):
    lk_model = case.attach()
    options = {"num_beams": beams, "num_return_sequences": sequences}
    with lk_model.use(MIXED):
        mixed = greedy(case.model, case.ids, **options)
    for row, name in enumerate(MIXED):
        ids = case.ids[row : row + 1]
        want = case.alone(name, lambda model, ids=ids: greedy(model, ids, **options))
        assert mixed[row * sequences : (row + 1) * sequences].tolist() == want.tolist()


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_a_batch_that_is_no_multiple_of_the_rows_is_an_error(case, batch):
    lk_model = case.attach()
    with (
        lk_model.use(MIXED),
        pytest.raises(lk.LorakernError, match=f"5 rows are named, but layer .* batch of {batch} "),
    ):
        logits(case.model, case.ids[:1].expand(batch, -1))


def test_left_padding_changes_no_row(case):
    """Rows of unequal length: a padded row gives the logits of the row alone."""
    lk_model = case.attach()
    mask = torch.ones_like(case.ids)
    mask[2, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with lk_model.use(MIXED):
        mixed = logits(case.model, case.ids, attention_mask=mask, position_ids=positions)
    want = case.alone(MIXED[2], lambda model: logits(model, case.ids[2:3, 3:]))
    torch.testing.assert_close(mixed[2:3, 3:], want, rtol=1e-5, atol=1e-5)


def test_gradients_through_the_branch_equal_pefts(case):
    """The gradient of an earlier trainable parameter (the embedding) goes through base and adapter alike."""
    lk_model = case.attach()
    labels = case.ids.roll(1, 1)

    def gradient(model, embedding):
        embedding.weight.requires_grad_(True)
        embedding.weight.grad = None
        model(input_ids=case.ids, labels=labels).loss.backward()
        return embedding.weight.grad.clone()

    frozen = [p for p in case.model.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        base = gradient(case.model, case.model.get_input_embeddings())
        for name in NAMES:
            want = case.alone(name, lambda model: gradient(model, model.get_base_model().get_input_embeddings()))
            with lk_model.use([name] * len(case.ids)):
                got = gradient(case.model, case.model.get_input_embeddings())
            assert error_ratio(got, want) < 1e-5
            assert error_ratio(got, base) > 1e-2
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
            parameter.grad = None


def test_base_weights_get_their_gradients_too(case):
    """All parameters trainable: y of each layer is written in place, and autograd must not mind."""
    lk_model = case.attach()
    with lk_model.use(MIXED):
        case.model(input_ids=case.ids, labels=case.ids).loss.backward()
    assert all(parameter.grad is not None for parameter in case.model.parameters())
    case.model.zero_grad(set_to_none=True)


def test_a_step_without_gradients_does_not_spoil_the_next_with_them(case):
    """Routes made under inference_mode are used again by a forward that saves them for its backward."""
    with torch.inference_mode():
        lk_model = case.attach()
    with lk_model.use(MIXED):
        with torch.inference_mode():
            case.model(input_ids=case.ids)
        case.model(input_ids=case.ids, labels=case.ids).loss.backward()
    case.model.zero_grad(set_to_none=True)


def test_add_and_remove_while_attached(case):
    lk_model = case.attach(["poet"])
    few = sum(hooks(case.model))
    with lk_model.use(["poet"] * len(case.ids)):
        want = logits(case.model, case.ids)
        lk_model.add("math", case.adapters["math"])  # more modules, a larger rank, one slot more
        assert torch.equal(logits(case.model, case.ids), want)
    assert sum(hooks(case.model)) > few
    lk_model.add("code", case.adapters["code"])
    assert lk_model.adapters == ("poet", "math", "code")
    with lk_model.use(MIXED):
        mixed = logits(case.model, case.ids)
    for row, name in enumerate(MIXED):
        want = case.alone(name, lambda model, row=row: logits(model, case.ids[row : row + 1]))
        torch.testing.assert_close(mixed[row : row + 1], want, rtol=1e-5, atol=1e-5)

    lk_model.remove("math")
    lk_model.add("again", case.adapters["code"])  # takes the freed slot, of a larger rank
    with lk_model.use(["again"] * len(case.ids)):
        got = logits(case.model, case.ids)
    want = case.alone("code", lambda model: logits(model, case.ids))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all(layer.bank.A[0].shape[0] <= 3 for layer in lk_model._layers.values())
    for name in lk_model.adapters:
        lk_model.remove(name)
    assert sum(hooks(case.model)) == 0


def test_an_adapter_in_use_is_not_removed(case):
    lk_model = case.attach()
    with lk_model.use(["poet", None]):
        with pytest.raises(lk.LorakernError, match="'poet' is in use"):
            lk_model.remove("poet")
        with pytest.raises(lk.LorakernError, match="the model is in use"):
            lk_model.detach()
        lk_model.remove("math")
    lk_model.remove("poet")
    assert lk_model.adapters == ("code",)


def test_max_adapters_allocates_once(case):
    lk_model = case.attach(["math"], max_adapters=2)
    places = [layer.bank.A[0].data_ptr() for layer in lk_model._layers.values()]
    lk_model.add("poet", case.adapters["poet"])
    assert [layer.bank.A[0].data_ptr() for layer in lk_model._layers.values()] == places
    with pytest.raises(lk.LorakernError, match="3 adapters are more than max_adapters = 2"):
        lk_model.add("code", case.adapters["code"])
    lk_model.remove("math")
    lk_model.add("code", case.adapters["code"])


def test_two_threads_have_their_own_rows(case):
    lk_model = case.attach()
    want = {name: case.alone(name, lambda model: logits(model, case.ids)) for name in NAMES}
    meet, failures = threading.Barrier(len(NAMES)), []

    def serve(name):
        try:
            for _ in range(5):
                with lk_model.use([name] * len(case.ids)):
                    meet.wait(30)  # every thread is inside of its block now
                    torch.testing.assert_close(logits(case.model, case.ids), want[name], rtol=1e-5, atol=1e-5)
                    meet.wait(30)
        except BaseException as error:
            meet.abort()
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_copied_context_takes_the_rows_to_another_thread(case):
    lk_model = case.attach()
    results = []
    with lk_model.use(MIXED):
        want = logits(case.model, case.ids)
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(lambda: results.append(logits(case.model, case.ids)),))
        thread.start()
        thread.join()
    assert torch.equal(results[0], want)


def test_blocks_nest_and_two_attachments_add_up(case):
    first, second = case.attach(["poet"]), case.attach(["code"])
    rows = len(case.ids)
    with first.use(["poet"] * rows):
        poet = logits(case.model, case.ids)
        with first.use([None] * rows), second.use(["code"] * rows):
            code = logits(case.model, case.ids)
        assert torch.equal(logits(case.model, case.ids), poet)
        with second.use(["code"] * rows):
            both = logits(case.model, case.ids)
    torch.testing.assert_close(code, case.alone("code", lambda m: logits(m, case.ids)), rtol=1e-5, atol=1e-5)
    case.peft.base_model.set_adapter(["poet", "code"])
    torch.testing.assert_close(both, logits(case.peft, case.ids), rtol=1e-5, atol=1e-5)


def test_nested_in_a_wrapper(case):
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(input_ids=ids).logits

    lk_model = attach(Wrapper(case.model), {"math": case.adapters["math"]})
    with torch.no_grad(), lk_model.use(["math"] * len(case.ids)):
        got = lk_model.model(case.ids)
    torch.testing.assert_close(got, case.alone("math", lambda m: logits(m, case.ids)), rtol=1e-5, atol=1e-5)

    twice = torch.nn.ModuleList([case.model, copy.deepcopy(case.model)])
    with pytest.raises(lk.LorakernError, match="2 modules of that end"):
        attach(twice, {"math": case.adapters["math"]})


def test_bfloat16_casts_factors_once_and_stays_close(case):
    model = copy.deepcopy(case.model).bfloat16()
    lk_model = attach(model, case.adapters)
    assert {layer.bank.A[0].dtype for layer in lk_model._layers.values()} == {torch.bfloat16}
    with lk_model.use(MIXED):
        got = logits(model, case.ids).float()
    base = logits(model, case.ids).float()
    with case.attach().use(MIXED):
        want = logits(case.model, case.ids)
    served = [row for row, name in enumerate(MIXED) if name]
    update = want - logits(case.model, case.ids)
    assert error_ratio((got - want + update)[served], update[served]) < 0.05
    assert torch.equal(got[1], base[1])


def test_autocast(case):
    lk_model = case.attach()
    with torch.autocast("cpu", torch.bfloat16), lk_model.use(MIXED):
        got = logits(case.model, case.ids).float()
    with lk_model.use(MIXED):
        want = logits(case.model, case.ids)
    update = want - logits(case.model, case.ids)
    assert error_ratio(got - want + update, update) < 0.05


def test_flattened_tokens_and_keyword_inputs():
    """A layer that gets (batch * positions, d_in), and its input by name."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    A, B = torch.randn(2, 4), torch.randn(3, 2)
    lk_model = attach(model, {"one": lk.LoraAdapter({"0": (A, B, 2.0)})})
    x = torch.randn(6, 4)
    with torch.no_grad(), lk_model.use([None, "one"]):
        got = model[0](input=x)
    want = model(x).detach()
    want[3:] += 2.0 * x[3:] @ A.T @ B.T
    torch.testing.assert_close(got, want)
    with torch.no_grad(), lk_model.use(["one"]):
        torch.testing.assert_close(model(x.T.contiguous().T)[3:], want[3:])
        torch.testing.assert_close(model(x[5]), want[5])


def test_a_layer_of_no_named_adapter_is_not_computed(case, monkeypatch):
    """Rows whose adapters leave a layer alone cost it nothing: the op is not called."""
    from lorakern.integrations import transformers

    calls = []
    monkeypatch.setattr(transformers, "bgmv", lambda *args, **options: calls.append(lk.bgmv(*args, **options)))
    lk_model = case.attach()
    with lk_model.use([None, "poet"]):
        logits(case.model, case.ids[:2])
    assert len(calls) == len(case.adapters["poet"]) < len(lk_model._layers)


def test_one_plan_for_all_layers(case, monkeypatch):
    from lorakern.integrations import slots

    made = []
    monkeypatch.setattr(slots, "plan", lambda *arguments: made.append(lk.plan(*arguments)) or made[-1])
    lk_model = case.attach(["math"])
    with lk_model.use(["math"] * len(case.ids)):
        for _ in range(3):
            logits(case.model, case.ids)
    assert len(made) <= len({layer.d_in for layer in lk_model._layers.values()}) <= 3 < len(lk_model._layers)


@pytest.mark.parametrize("rows", ["poet", [], None, 3])
def test_rows_must_be_a_list_of_names(case, rows):
    with pytest.raises(lk.LorakernError, match="use: rows must be a list"), case.attach().use(rows):
        pass


@pytest.mark.parametrize("rows", [["nobody"], ["poet", 3], [["poet"]]])
def test_unknown_names(case, rows):
    lk_model = case.attach()
    with pytest.raises(lk.LorakernError, match=r"no adapter .* is attached; there are poet, math"), lk_model.use(rows):
        pass


def bad_adapters():
    A, B = torch.ones(2, 48), torch.ones(48, 2)
    target = "model.layers.0.self_attn.q_proj"
    return [
        (
            {"model.layers.0.self_attn.qq_proj": (A, B, 1.0)},
            r"no such module \(the nearest is '.*q_proj'\).*'other/model'",
        ),
        (
            {target: (torch.ones(2, 47), B, 1.0)},
            r"'bad', module '.*q_proj': A \(2, 47\) and B \(48, 2\) do not fit .* 48",
        ),
        ({target: (A, torch.ones(96, 2), 1.0)}, r"B \(96, 2\) do not fit the layer of d_in = 48 and d_out = 48"),
        ({"model.layers.0.self_attn": (A, B, 1.0)}, "is a LlamaAttention; adapters attach to torch.nn.Linear"),
        ({"model.embed_tokens": (A, B, 1.0)}, "is a Embedding"),
        ({"q_proj": (A, B, 1.0)}, "2 modules of that end"),
        ({target: (A, B, 1.0), "layers.0.self_attn.q_proj": (A, B, 1.0)}, "is the same layer as"),
    ]


@pytest.mark.parametrize("number", range(len(bad_adapters())))
def test_an_adapter_that_does_not_fit_changes_nothing(number):
    factors, message = bad_adapters()[number]
    model = build("llama")
    good = lk.LoraAdapter({"model.layers.1.mlp.up_proj": (torch.ones(2, 48), torch.ones(80, 2), 1.0)})
    bad = lk.LoraAdapter(factors, base_model_name_or_path="other/model")
    with pytest.raises(lk.LorakernError, match=message):
        attach(model, {"good": good, "bad": bad})
    assert sum(hooks(model)) == 0
    lk_model = attach(model, {"good": good})
    with pytest.raises(lk.LorakernError, match=message):
        lk_model.add("bad", bad)
    assert lk_model.adapters == ("good",)
    assert sum(hooks(model)) == 1


def test_other_bad_arguments(case):
    with pytest.raises(lk.LorakernError, match=r"model must be a torch\.nn\.Module"):
        attach("model", {})
    with pytest.raises(lk.LorakernError, match="adapters must map names"):
        attach(case.model, list(case.adapters))
    with pytest.raises(lk.LorakernError, match="max_adapters must be None or a positive integer"):
        attach(case.model, {}, max_adapters=0)
    with pytest.raises(lk.LorakernError, match="must be a LoraAdapter; got str"):
        attach(case.model, {"poet": "some/directory"})
    with pytest.raises(lk.LorakernError, match="a PEFT model must be unloaded"):
        attach(case.peft, case.adapters)
    lk_model = case.attach(["poet"])
    with pytest.raises(lk.LorakernError, match="'poet' is attached already"):
        lk_model.add("poet", case.adapters["poet"])
    with pytest.raises(lk.LorakernError, match="no adapter 'math' is attached; there are poet"):
        lk_model.remove("math")


def test_a_failure_while_writing_leaves_no_slot_behind(case, monkeypatch):
    from lorakern.integrations.slots import LayerSlots

    lk_model = case.attach(["poet"])
    with lk_model.use(["poet"] * len(case.ids)):
        want = logits(case.model, case.ids)
    write, written = LayerSlots.write, []

    def fail_at_the_third(self, slot, factors):
        if len(written) == 2:
            raise MemoryError
        written.append(write(self, slot, factors))

    monkeypatch.setattr(LayerSlots, "write", fail_at_the_third)
    with pytest.raises(MemoryError):
        lk_model.add("math", case.adapters["math"])
    monkeypatch.undo()
    assert sum(hooks(case.model)) == len(lk_model._layers) == len(case.adapters["poet"])
    lk_model.add("code", case.adapters["code"])
    with lk_model.use(["poet"] * len(case.ids)):
        assert torch.equal(logits(case.model, case.ids), want)
    with lk_model.use(["code"] * len(case.ids)):
        got = logits(case.model, case.ids)
    torch.testing.assert_close(got, case.alone("code", lambda m: logits(m, case.ids)), rtol=1e-5, atol=1e-5)
