"""The wrapper beside a plain loop over rows, and beside vLLM's own for the CPU, without an engine."""

import types

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from lorakern.errors import LorakernError
from lorakern.integrations.vllm.layers import LayerWrapper, bind, follow
from lorakern.integrations.vllm.wrapper import PunicaWrapper

SLOTS, R_MAX, D_IN = 4, 16, 48
WIDTHS = (40, 24, 24)
RANKS = ((4, 16, 0, 9), (1, 16, 0, 9), (8, 16, 5, 0))  # by slice and slot
IDS = [7, 3, None, 9]  # the adapter of each slot
TOKENS = (3, 3, 0, 7, 9, 0, 7)  # the adapter of each token
SLOT_OF = {0: -1, 7: 0, 3: 1, 9: 3}
PROMPTS = (9, 0, 3)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Layer(types.SimpleNamespace):
    def set_mapping(self, wrapper):
        self.punica_wrapper = wrapper


def make_layer(wrapper, dtype=torch.float32):
    """What vLLM's layers have: stacked factors, padded with zeros, and the wrapper."""
    generator = torch.Generator().manual_seed(0)
    layer = Layer(punica_wrapper=wrapper, lora_a_stacked=[], lora_b_stacked=[])
    for width, ranks in zip(WIDTHS, RANKS, strict=True):
        a, b = torch.zeros(SLOTS, 1, R_MAX, D_IN), torch.zeros(SLOTS, 1, width, R_MAX)
        for slot, rank in enumerate(ranks):
            a[slot, 0, :rank] = torch.randn(rank, D_IN, generator=generator) / 8
            b[slot, 0, :, :rank] = torch.randn(width, rank, generator=generator) / 8
        layer.lora_a_stacked.append(a.to(dtype))
        layer.lora_b_stacked.append(b.to(dtype))
    return layer


def make_wrapper(cls=PunicaWrapper, tokens=TOKENS, prompts=PROMPTS):
    wrapper = cls(64, max_batches=8, device="cpu", lora_config=None)
    wrapper.update_metadata(LoRAMapping(tokens, prompts, is_prefill=True), IDS, SLOTS + 1, 1000)
    return wrapper


def expected(y, x, layer, ids, scale=1.0):
    """A loop over rows and slices, in float64."""
    y = y.double()
    for row, adapter in enumerate(ids):
        if adapter:
            slot = SLOT_OF[adapter]
            updates = [b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double()) for a, b in factors(layer)]
            y[row, : sum(WIDTHS)] += scale * torch.cat(updates)
    return y


def factors(layer):
    return list(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True))


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def measured(wrapper, dtype=torch.float32):
    """A layer with a wrapper of its own, whose slots have been measured, and what it was like before."""
    layer = make_layer(wrapper, dtype)
    bind(layer)
    for slot in range(SLOTS):
        layer.punica_wrapper.factors.measure(slot)
    return layer, make_layer(wrapper, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("measure", [True, False])
def test_linear(dtype, measure):
    wrapper = make_wrapper()
    layer, plain = measured(wrapper, dtype) if measure else [make_layer(wrapper, dtype)] * 2
    assert isinstance(layer.punica_wrapper, LayerWrapper if measure else PunicaWrapper)
    x, y = torch.randn(len(TOKENS), D_IN).to(dtype), torch.randn(len(TOKENS), sum(WIDTHS)).to(dtype)
    want, base = expected(y, x, plain, TOKENS, 0.5), y.clone()
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 0.5, WIDTHS)
    assert error(y, want) < TOLERANCE[dtype]
    bare = torch.tensor(TOKENS) == 0
    assert torch.equal(y[bare], base[bare])


def test_padding_is_never_read():
    layer, plain = measured(make_wrapper())
    for (a, b), ranks in zip(factors(layer), RANKS, strict=True):
        for slot, rank in enumerate(ranks):
            a[slot, 0, rank:] = torch.nan
            b[slot].view(-1)[rank * b.shape[2] :] = torch.nan  # a measured slot is packed where it lies
    x, y = torch.randn(len(TOKENS), D_IN), torch.zeros(len(TOKENS), sum(WIDTHS))
    want = expected(y, x, plain, TOKENS)
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS)
    assert error(y, want) < 1e-6
    assert layer.punica_wrapper.factors.ranks_a.tolist() == [list(ranks) for ranks in RANKS]
    assert layer.punica_wrapper.factors.ranks_b.tolist() == [list(ranks) for ranks in RANKS]


def test_slices_of_equal_ranks_are_one_call():
    layer, _ = measured(make_wrapper())
    assert [group.column for group in layer.punica_wrapper.factors.groups] == [0, 40, 64]
    for a, b in factors(layer)[1:]:
        for stacked in (a, b):
            stacked.zero_()
    for slot in range(SLOTS):
        layer.punica_wrapper.factors.measure(slot)
    assert [group.column for group in layer.punica_wrapper.factors.groups] == [0, 40]


def test_factors_of_another_dtype():
    wrapper = make_wrapper()
    layer, plain = measured(wrapper, torch.bfloat16)
    x, y = torch.randn(len(TOKENS), D_IN), torch.randn(len(TOKENS), sum(WIDTHS))
    want = expected(y, x, plain, TOKENS)
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS)
    assert error(y, want) < 1e-2


def test_shrink_and_expand_as_fully_sharded_layers_call_them():
    wrapper = make_wrapper()
    layer, plain = measured(wrapper)
    x, y = torch.randn(len(TOKENS), D_IN), torch.randn(len(TOKENS), 10 + sum(WIDTHS))
    left = y[:, :10].clone()
    want = expected(y[:, 10:], x, plain, TOKENS)
    h = torch.full((len(WIDTHS), len(TOKENS), R_MAX), torch.nan)
    layer.punica_wrapper.add_shrink(h, x, layer.lora_a_stacked, 1.0)
    layer.punica_wrapper.add_expand(y, h, layer.lora_b_stacked, WIDTHS, offset_start=10, add_input=True)
    assert error(y[:, 10:], want) < 1e-6
    assert torch.equal(y[:, :10], left)


def test_expand_overwrites_where_it_is_told_to():
    wrapper = make_wrapper(tokens=(3, 3), prompts=(3,))
    layer, plain = measured(wrapper)
    x, y = torch.randn(2, D_IN), torch.full((2, sum(WIDTHS)), torch.nan)
    h = torch.empty(len(WIDTHS), 2, R_MAX)
    layer.punica_wrapper.add_shrink(tuple(h), x, layer.lora_a_stacked, 1.0)
    layer.punica_wrapper.add_expand(y, tuple(h), layer.lora_b_stacked, WIDTHS, add_inputs=False)
    assert error(y, expected(torch.zeros_like(y), x, plain, (3, 3))) < 1e-6


def test_batches_padded_beyond_the_mapping_and_of_three_dimensions():
    wrapper = make_wrapper()
    layer, plain = measured(wrapper)
    rows = len(TOKENS) + 5
    x, y = torch.randn(rows, D_IN), torch.randn(rows, sum(WIDTHS))
    want = expected(y, x, plain, TOKENS + (0,) * 5)
    layer.punica_wrapper.add_lora_linear(y[None], x[None], layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS)
    assert error(y, want) < 1e-6


def test_a_step_without_adapters_touches_nothing():
    wrapper = make_wrapper(tokens=(0, 0), prompts=(0,))
    layer, _ = measured(wrapper)
    y = torch.randn(2, sum(WIDTHS))
    base = y.clone()
    x = torch.randn(2, D_IN)
    layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS)
    assert torch.equal(y, base)


def make_pair(wrapper, of=0):
    """A layer that has one A and one B, as that of the logits, before and after its slots were measured."""
    plain = make_layer(wrapper)
    a, b = factors(plain)[of]
    a[-1], b[-1] = 0, 0  # vLLM's own serves rows without an adapter with the last slot: keep it empty
    layer = Layer(punica_wrapper=wrapper, lora_a_stacked=a.clone(), lora_b_stacked=b.clone())
    bind(layer)
    for slot in range(SLOTS):
        layer.punica_wrapper.factors.measure(slot)
    return layer, a, b


@pytest.mark.parametrize("columns", [40, 36, 44])
def test_logits(columns):
    wrapper, own = make_wrapper(), make_wrapper(PunicaWrapperCPU)
    layer, a, b = make_pair(wrapper)
    x, y = torch.randn(len(PROMPTS), D_IN), torch.randn(len(PROMPTS), columns)
    want, direct = y.clone(), y.clone()
    own.add_lora_logits(want, x, a, b, 1.0)
    wrapper.add_lora_logits(direct, x, a, b, 1.0)
    layer.punica_wrapper.add_lora_logits(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
    assert error(y, want.double()) < 1e-6
    assert error(direct, want.double()) < 1e-6


def test_embedding():
    wrapper = make_wrapper()
    layer, _, b = make_pair(wrapper, of=1)
    chosen, y = torch.randn(len(TOKENS), R_MAX), torch.randn(len(TOKENS), WIDTHS[1])
    want, direct = y.double(), y.clone()
    for row, adapter in enumerate(TOKENS):
        if adapter:
            want[row] += b[SLOT_OF[adapter], 0].double() @ chosen[row].double()
    wrapper.add_lora_embedding(direct, chosen, b, add_input=True)
    layer.punica_wrapper.add_lora_embedding(y, chosen, layer.lora_b_stacked, add_input=True)
    assert error(direct, want) < 1e-6
    assert error(y, want) < 1e-6


def test_full_linear():
    wrapper, own = make_wrapper(), make_wrapper(PunicaWrapperCPU)
    weight, bias = torch.randn(SLOTS, 1, 5, D_IN), torch.randn(SLOTS, 5)
    enabled = torch.tensor([True, True, False, False])
    x, y = torch.randn(len(PROMPTS), D_IN), torch.randn(len(PROMPTS), 5)
    want = y.clone()
    own.apply_lora_full_linear(want, x, weight, bias, enabled)
    wrapper.apply_lora_full_linear(y, x, weight, bias, enabled)
    assert error(y, want.double()) < 1e-6


class Manager:
    """As much of vLLM's as `follow` needs: layers, slots, and adapters that come into slot 1."""

    def __init__(self, layer):
        self.lora_index_to_id, self.modules, self.fails = [None] * SLOTS, {"qkv": layer}, False
        self._create_lora_modules()

    def _create_lora_modules(self):
        pass

    def _add_adapter(self, lora):
        self.added = lora.id

    def activate_adapter(self, lora_id):
        if lora_id in self.lora_index_to_id:
            return False
        self.lora_index_to_id[1] = lora_id
        if self.fails:
            raise ValueError("half way")
        return True


def test_the_manager_measures_what_it_activates():
    wrapper = make_wrapper()
    layer = make_layer(wrapper)
    follow(Manager)
    follow(Manager)
    manager = Manager(layer)
    known = layer.punica_wrapper.factors
    assert known.ranks_b is None
    assert manager.activate_adapter(3)
    assert known.ranks_b[0].tolist() == [16, 16, 16, 16]
    layer.lora_a_stacked[0][1, 0, 5:] = 0
    assert not manager.activate_adapter(3)
    assert known.ranks_b[0].tolist() == [16, 16, 16, 16]
    manager.lora_index_to_id[1] = None
    assert manager.activate_adapter(3)
    assert known.ranks_a[0].tolist() == known.ranks_b[0].tolist() == [16, 5, 16, 16]
    manager.lora_index_to_id[1], manager.fails = None, True
    with pytest.raises(ValueError, match="half way"):
        manager.activate_adapter(3)
    assert known.ranks_b[0].tolist() == [16, 0, 16, 16]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_adapters_that_are_not_finite_are_refused(value):
    good = types.SimpleNamespace(lora_a=torch.ones(2, 4), lora_b=[torch.ones(4, 2), None])
    bad = types.SimpleNamespace(lora_a=torch.ones(2, 4), lora_b=[torch.ones(4, 2), torch.full((4, 2), value)])
    follow(Manager)
    manager = Manager(make_layer(make_wrapper()))
    manager._add_adapter(types.SimpleNamespace(id=3, loras={"qkv": good}))
    assert manager.added == 3
    with pytest.raises(LorakernError, match="adapter 4: lora_B of qkv has values that are NaN or infinite"):
        manager._add_adapter(types.SimpleNamespace(id=4, loras={"qkv": bad}))
    assert manager.added == 3


def test_a_layer_in_a_compiled_model():
    """The trace keeps the op, not what the layer had at hand: later steps and adapters count."""
    wrapper = make_wrapper()
    layer, plain = measured(wrapper)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def forward(y, x):
        layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS)
        return y * 1

    for tokens in (TOKENS, (0, 0, 3), (9, 9, 9, 9)):
        wrapper.update_metadata(LoRAMapping(tokens, tokens[:1], is_prefill=True), IDS, SLOTS + 1, 1000)
        x, y = torch.randn(len(tokens), D_IN), torch.randn(len(tokens), sum(WIDTHS))
        want = expected(y, x, plain, tokens)
        assert error(forward(y, x), want) < 1e-6


def test_a_layer_that_no_manager_made_is_not_compiled():
    wrapper = make_wrapper()
    layer = make_layer(wrapper)

    @torch.compile(fullgraph=True, backend="eager")
    def forward(y, x):
        wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS)
        return y

    with pytest.raises(Exception, match="enforce-eager"):
        forward(torch.randn(len(TOKENS), sum(WIDTHS)), torch.randn(len(TOKENS), D_IN))


def test_experts_go_to_vllms_own_wrapper(monkeypatch):
    calls = []

    class Own:
        token_mapping_meta = "meta"

        def __init__(self, *args, **kwargs):
            calls.append(("made", args[0]))

        def update_metadata(self, mapping, *args, **kwargs):
            calls.append(("metadata", mapping.index_mapping))

        def add_lora_w13(self, *args, **kwargs):
            return "aligned"

    monkeypatch.setattr("lorakern.integrations.vllm.wrapper.resolve_obj_by_qualname", lambda name: Own)
    wrapper = make_wrapper()
    assert calls == []
    assert wrapper.add_lora_w13(1, top_k=2) == "aligned"
    assert wrapper.token_mapping_meta == "meta"
    wrapper.update_metadata(LoRAMapping((9,), (9,), is_prefill=False), IDS, SLOTS + 1, 1000)
    assert calls == [("made", 64), ("metadata", TOKENS), ("metadata", (9,))]
