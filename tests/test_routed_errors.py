"""Every wrong argument of the router ops is refused by name, and nothing is written."""

import pytest
import torch
from routed_problems import routed

import lorakern as lk

BAD = [
    ("router_A", lambda a: a["router_A"][0][None]),
    ("router_A", lambda a: a["router_A"][0][:0]),
    ("router_A", lambda a: a["router_A"][0][:, :-1]),
    ("router_A", lambda a: a["router_A"][0].double()),
    ("router_A", lambda a: a["router_A"][0].t().contiguous().t()),
    ("router_A", lambda a: a["router_A"][0].to("meta")),
    ("router_A", lambda a: a["router_A"] * 2),
    ("router_A", lambda a: []),
    ("router_A", lambda a: None),
    ("cores", lambda a: a["cores"][0][0]),
    ("cores", lambda a: a["cores"][0][:-1]),
    ("cores", lambda a: a["cores"][0][:, :-1]),
    ("cores", lambda a: a["cores"][0].bfloat16()),
    ("cores", lambda a: a["cores"][0].transpose(1, 2).contiguous().transpose(1, 2)),
    ("cores", lambda a: a["cores"][0].to("meta")),
    ("cores", lambda a: a["cores"] * 2),
    ("cores", lambda a: "cores"),
    ("x", lambda a: a["x"][0]),
    ("indices", lambda a: a["indices"].float()),
    ("indices", lambda a: a["indices"][:-1]),
    ("indices", lambda a: a["indices"] + 5),
    ("indices", lambda a: a["indices"] * 0 - 2),
    ("ranks", lambda a: a["ranks"].float()),
    ("ranks", lambda a: a["ranks"][:-1]),
    ("ranks", lambda a: a["ranks"] + 9),
    ("ranks", lambda a: a["ranks"] - 9),
]
BAD_OF_BGMV = [
    ("A", lambda a: a["A"][0][..., :-1]),
    ("A", lambda a: a["A"][0].half()),
    ("B", lambda a: a["B"][0].half()),
    ("B", lambda a: a["B"] * 2),
    ("scale", lambda a: a["scale"][:-1]),
    ("plan", lambda a: (1, 2)),
    ("plan", lambda a: lk.plan(a["indices"], 7)),
    ("y_offset", lambda a: -1),
    ("y", lambda a: a["y"][:, :20]),
    ("y", lambda a: a["y"].bfloat16()),
    ("y", lambda a: a["x"][:, :31]),
]


@pytest.fixture
def arguments():
    r = routed(torch.float32, 6, 2, 5, 40, (24,), 8)
    x, A, B, router_A, cores, indices = r.arguments
    return {
        "y": r.lora.y, "x": x, "A": A, "B": B, "router_A": router_A, "cores": cores, "indices": indices, **r.options
    }  # fmt: skip


@pytest.mark.parametrize(("name", "bad"), BAD + BAD_OF_BGMV)
def test_routed_bgmv_refuses(arguments, name, bad):
    arguments[name] = bad(arguments)
    y = arguments["y"]
    before = y.clone()
    with pytest.raises(lk.LorakernError, match=f": {name} must|^{name} must"):
        lk.routed_bgmv(**arguments)
    assert torch.equal(y.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["router_A", "cores"])
def test_y_may_not_share_memory_with_the_router(arguments, name):
    buffer = torch.randn(5 * 40 * 8)
    shape = arguments[name][0].shape
    arguments[name] = buffer[: shape.numel()].view(shape)
    arguments["y"] = buffer[: 6 * 24].view(6, 24)
    with pytest.raises(lk.LorakernError, match=f"not share memory with {name}"):
        lk.routed_bgmv(**arguments)


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_attention_gates_refuses(arguments, name, bad):
    h = lk.shrink(arguments["x"], arguments["A"], arguments["indices"])
    arguments[name] = bad(arguments)
    given = {key: arguments[key] for key in ("x", "router_A", "cores", "indices", "ranks")}
    with pytest.raises(lk.LorakernError, match="must"):
        lk.attention_gates(h=h, **given)


@pytest.mark.parametrize(
    "bad", ["h", lambda h: h[0], lambda h: h.double(), lambda h: h[..., :-1], lambda h: h.to("meta")]
)
def test_attention_gates_refuses_another_h(arguments, bad):
    h = lk.shrink(arguments["x"], arguments["A"], arguments["indices"])
    given = {key: arguments[key] for key in ("x", "router_A", "cores", "indices", "ranks")}
    with pytest.raises(lk.LorakernError, match="h must"):
        lk.attention_gates(h=bad if isinstance(bad, str) else bad(h), **given)


@pytest.mark.parametrize(
    ("name", "B", "router_B", "options"),
    [
        ("B", torch.ones(3, 4), torch.ones(4, 2), {}),
        ("B", torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(3, 2), {}),
        ("B", [torch.ones(2, 3, 4), torch.ones(2, 3, 5)], [torch.ones(3, 2)] * 2, {}),
        ("router_B", torch.ones(2, 3, 4), torch.ones(4, 2), {}),
        ("router_B", torch.ones(2, 3, 4), torch.ones(3), {}),
        ("router_B", torch.ones(2, 3, 4), torch.ones(3, 2, device="meta"), {}),
        ("router_B", torch.ones(2, 3, 4), [torch.ones(3, 2)] * 2, {}),
        ("scale", torch.ones(2, 3, 4), torch.ones(3, 2), {"scale": torch.ones(3)}),
        ("ranks", torch.ones(2, 3, 4), torch.ones(3, 2), {"ranks": torch.tensor([1, 5])}),
        ("ranks", torch.ones(2, 3, 4), torch.ones(3, 2), {"ranks": torch.tensor([1])}),
    ],
)
def test_router_cores_refuses(name, B, router_B, options):
    with pytest.raises(lk.LorakernError, match=f"{name} must"):
        lk.router_cores(B, router_B, **options)
