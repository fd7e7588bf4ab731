"""Every composition of a layer against its formula with each adapter's update formed, and what must not matter."""

import math
from types import SimpleNamespace

import pytest
import torch

import lorakern as lk
from lorakern.errors import LorakernError
from lorakern.mixture import Routers
from lorakern.mixture.layers import MixtureLayers, tokens_of
from lorakern.mixture.modes import MODES

D_IN, D_OUT, SLOTS, K = 24, 40, 6, 3
NAMES = ("a", "b", "c", "d")
RANKS = (4, 2, 7, 4)
ROWS, LENGTHS = [[0, 2, 1], [3], [1, 3], [], [0, 1, 3]], [3, 2, 1, 2, 4]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(D_IN, D_OUT, bias=False)

    def forward(self, x):
        return self.proj(x)


class One(torch.nn.Module):
    """One decoder layer of one linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(hidden_size=D_IN)
        self.layers = torch.nn.ModuleList([Block()])

    def forward(self, x):
        return self.layers[0](x)


def adapters(equal=False):
    generator = torch.Generator().manual_seed(1)
    made = {}
    for i, (name, rank) in enumerate(zip(NAMES, RANKS, strict=True)):
        if equal:
            generator, rank, i = torch.Generator().manual_seed(1), 4, 0
        A, B = torch.randn(rank, D_IN, generator=generator), torch.randn(D_OUT, rank, generator=generator)
        made[name] = lk.LoraAdapter({"layers.0.proj": (A, B, 0.3 + 0.2 * i)})
    return made


def routers_of(model, mode, spread=1.0):
    """Parameters that tell adapters apart."""
    if not MODES[mode].learned:
        return None
    routers = Routers.init(model, mode, adapters=NAMES, rank=5)
    generator = torch.Generator().manual_seed(2)
    for tensor in routers.parameters().values():
        tensor.copy_(spread * torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    return routers


def layers_of(mode, chosen=None, routers="made"):
    model = One()
    layers = MixtureLayers(model, mode, SLOTS, routers_of(model, mode) if routers == "made" else routers)
    for slot, (name, adapter) in enumerate((chosen or adapters()).items()):
        layers.load(slot, name, layers.fit("test", name, adapter))
    return model, layers


def mixture_of(mode, x, rows, lengths, chosen=None, routers="made", **options):
    """What the mode adds to the base model."""
    model, layers = layers_of(mode, chosen, routers)
    tokens = tokens_of(rows, lengths, width=K, slots=SLOTS, **options)
    with torch.no_grad():
        base = model(x)
        with layers.run(tokens):
            return model(x) - base, tokens


def x_of(lengths, seed=3):
    return torch.randn(sum(lengths), D_IN, generator=torch.Generator().manual_seed(seed))


def softmax_of(logits, top=None):
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top or len(logits)]
    weights = [math.exp(logits[i] - max(logits)) if i in order else 0.0 for i in range(len(logits))]
    return [weight / sum(weights) for weight in weights]


def naive(mode, x, row, chosen, router, prompt):
    """The mixture of one token (d_in,), in float64, every update formed."""
    factors = [list(chosen.values())[slot]["layers.0.proj"] for slot in row]
    updates = [f.scale * f.B.double() @ (f.A.double() @ x) for f in factors]
    gate = [router["gate"][slot].double() for slot in row] if "gate" in router else None
    if mode in ("selection", "mixture"):
        weights = [1 / len(row)] * len(row)
    elif mode == "fusion":
        rank = max(f.rank for f in factors)
        A = sum(torch.nn.functional.pad(f.A.double(), (0, 0, 0, rank - f.rank)) for f in factors) / len(row)
        B = sum(f.scale * torch.nn.functional.pad(f.B.double(), (0, rank - f.rank)) for f in factors) / len(row)
        return B @ (A @ x)
    elif mode == "ramole":
        q = router["A"].double() @ x
        weights = softmax_of([float(q @ (router["B"].double().T @ v)) / math.sqrt(5) for v in updates])
    elif mode == "mole":
        weights = softmax_of([float(g @ v / v.norm()) for g, v in zip(gate, updates, strict=True)])
    elif mode == "lora_flow":
        weights = softmax_of([float(g @ x) for g in gate])
        weights = [w + float(router["bias"][slot]) for w, slot in zip(weights, row, strict=True)]
    elif mode == "meteora":
        weights = softmax_of([float(g @ x) for g in gate], 2)
    elif mode == "milora":
        weights = softmax_of([float(g @ prompt.mean(0)) for g in gate], 2)
    elif mode == "arrow":
        first = [torch.linalg.svd(f.B.double() @ f.A.double()).Vh[0] for f in factors]
        weights = softmax_of([abs(float(v @ x)) for v in first], 3)
    return sum(w * v for w, v in zip(weights, updates, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_the_formula(mode):
    chosen = adapters()
    rows = [row[:1] for row in ROWS] if mode == "selection" else ROWS
    x = x_of(LENGTHS)
    routers = routers_of(One(), mode)
    router = next(iter(routers.layers.values())) if routers else {}
    got, _ = mixture_of(mode, x, rows, LENGTHS, chosen)
    expected = torch.zeros(len(x), D_OUT, dtype=torch.float64)
    first = 0
    for row, length in zip(rows, LENGTHS, strict=True):
        prompt = x[first : first + length].double()
        for t in range(first, first + length):
            if row:
                expected[t] = naive(mode, x[t].double(), row, chosen, router, prompt)
        first += length
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("mode", MODES)
def test_one_adapter_is_that_adapter(mode):
    chosen, x = adapters(), x_of([4])
    f = chosen["b"]["layers.0.proj"]
    got, _ = mixture_of(mode, x, [[1]], [4], chosen)
    expected = f.scale * x @ f.A.T @ f.B.T
    if mode == "lora_flow":
        bias = routers_of(One(), mode).layers["layers.0"]["bias"][1]
        expected = expected * (1 + bias)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("lora_flow", "selection")])
def test_equal_adapters_are_that_adapter(mode):
    chosen, x = adapters(equal=True), x_of([4])
    alone, _ = mixture_of(mode, x, [[1]], [4], chosen)
    got, _ = mixture_of(mode, x, [[0, 1, 3]], [4], chosen)
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)


def test_a_router_of_zeros_is_the_mixture():
    routers, x = Routers.init(One(), "ramole", rank=5), x_of(LENGTHS)
    routers.layers["layers.0.proj"]["B"].zero_()
    got, _ = mixture_of("ramole", x, ROWS, LENGTHS, routers=routers)
    mean, _ = mixture_of("mixture", x, ROWS, LENGTHS)
    torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_token_is_the_same_to_the_bit_in_any_company(mode):
    rows = [row[:1] for row in ROWS] if mode == "selection" else ROWS
    x = x_of(LENGTHS)
    _, layers = layers_of(mode)

    def mixed(x, rows, lengths, size):
        # of a fixed size, as the packed model has them
        padded = torch.zeros(size, D_IN)
        padded[: len(x)] = x
        tokens = tokens_of(rows, lengths, width=K, slots=SLOTS, size=size)
        path = "layers.0.proj"
        with torch.no_grad():
            if layers.mode.per_block:
                layers.mode.enter("layers.0", padded, layers._layers[path], tokens)
            return layers.mode.add(torch.zeros(size, D_OUT), padded, layers._layers[path], tokens)[: len(x)]

    y = mixed(x, rows, LENGTHS, 16)
    first = 0
    for row, length in zip(rows, LENGTHS, strict=True):
        span = slice(first, first + length)
        assert torch.equal(mixed(x[span], [row], [length], 16), y[span]), row
        first += length


@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode].learned])
def test_learned_parameters_get_the_gradient_of_the_formula(mode):
    x = x_of(LENGTHS)
    model, layers = layers_of(mode, routers=routers_of(One(), mode))
    layers.close()
    layers = MixtureLayers(model, mode, len(NAMES), routers_of(model, mode))
    for slot, (name, adapter) in enumerate(adapters().items()):
        layers.load(slot, name, layers.fit("test", name, adapter))
    model.requires_grad_(False)
    routers = routers_of(model, mode)
    parameters = [tensor.requires_grad_() for tensor in routers.parameters().values()]
    target = torch.randn(len(x), D_OUT, generator=torch.Generator().manual_seed(5))

    def loss():
        with layers.follow(routers), layers.run(tokens_of(ROWS, LENGTHS, width=K, slots=len(NAMES))):
            return (model(x) * target).sum()

    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        step, values = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(loss().item())
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_gates_are_watched(mode):
    rows = [row[:1] for row in ROWS] if mode == "selection" else ROWS
    _, tokens = mixture_of(mode, x_of(LENGTHS), rows, LENGTHS, watch=True)
    sums, number = tokens.watched()
    served = torch.tensor([bool(row) for row in rows]).repeat_interleave(torch.tensor(LENGTHS))
    assert torch.equal(number[:, 0] > 0, served)
    if mode != "lora_flow":
        torch.testing.assert_close(sums.sum(1), served.float())


def test_milora_keeps_its_choice():
    model, layers = layers_of("milora")
    memory, x = {}, x_of([5, 5])
    common = {"width": K, "slots": SLOTS, "size": 16, "count": 4, "memory": memory}
    padded = torch.zeros(16, D_IN)
    padded[:10] = x
    with torch.no_grad():
        with layers.run(tokens_of([[0, 1, 2], [1, 2, 3]], [5, 5], sequences=[2, 0], **common)):
            model(padded)
        chosen = memory["layers.0.proj"].clone()
        with layers.run(tokens_of([[0, 1, 2]], [1], sequences=[2], pooled=[0], **common)):
            model(torch.randn(16, D_IN))
    assert torch.equal(memory["layers.0.proj"], chosen)
    assert chosen[2].sum() == pytest.approx(1.0) and (chosen[2] > 0).sum() == 2 and not chosen[1].any()


def test_a_slot_forgets_what_it_held():
    model, layers = layers_of("mole")
    small = adapters()["b"]
    layers.load(2, "c", layers.fit("test", "c", small))
    x = x_of([2])
    with torch.no_grad():
        base = model(x)
        with layers.run(tokens_of([[2]], [2], width=K, slots=SLOTS)):
            got = model(x) - base
    f = small["layers.0.proj"]
    torch.testing.assert_close(got, f.scale * x @ f.A.T @ f.B.T, rtol=1e-4, atol=1e-4)


def test_the_model_is_given_back():
    model, layers = layers_of("mixture")
    layers.close()
    assert not model.layers[0].proj._forward_hooks


@pytest.mark.parametrize(
    ("mode", "routers", "match"),
    [
        ("soup", None, "mode must be one of selection, fusion"),
        ("ramole", None, "needs routers"),
        ("mixture", Routers("mixture", {}), "no use to mode 'mixture'"),
        ("mole", Routers("ramole", {}), "of mode 'ramole'"),
        ("ramole", Routers("ramole", {"layers.7": {}}), "differ in layer"),
        ("ramole", Routers("ramole", {"layers.0.proj": {"A": torch.ones(2, 3), "B": torch.ones(D_OUT, 2)}}), "has"),
    ],
)
def test_routers_that_do_not_fit_are_refused(mode, routers, match):
    with pytest.raises(LorakernError, match=match):
        MixtureLayers(One(), mode, SLOTS, routers)


def test_an_adapter_without_a_gate_is_refused():
    model = One()
    layers = MixtureLayers(model, "meteora", SLOTS, Routers.init(model, "meteora", adapters=("a", "b")))
    with pytest.raises(LorakernError, match=r"no gate for adapter 'c'.*ramole"):
        layers.fit("add", "c", adapters()["c"])


@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode].learned])
def test_routers_on_disk(mode, tmp_path):
    routers = routers_of(One(), mode)
    routers.save(tmp_path / "r.safetensors")
    again = Routers.load(tmp_path / "r.safetensors")
    assert (again.mode, again.adapters) == (mode, routers.adapters)
    for name, tensor in routers.parameters().items():
        assert torch.equal(again.parameters()[name], tensor)


def test_damaged_routers_are_refused(tmp_path):
    file = tmp_path / "r.safetensors"
    with pytest.raises(LorakernError, match="cannot be read"):
        Routers.load(file)
    routers = routers_of(One(), "ramole")
    routers.layers["layers.0.proj"]["A"][0, 0] = torch.nan
    routers.save(file)
    with pytest.raises(LorakernError, match="NaN or infinity"):
        Routers.load(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(LorakernError):
        Routers.load(file)
