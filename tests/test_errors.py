"""Bad input: one exception class, a message that names the argument, and nothing changed."""

import pytest
import torch
from problems import problem

import lorakern as lk


def good():
    p = problem(torch.float32, tokens=6, choices=2, slots=4, d_in=16, d_outs=(12,), r_max=4)
    return {
        "y": p.y,
        "x": p.x,
        "A": p.A[0],
        "B": p.B[0],
        "indices": p.indices,
        "scale": p.scale,
        "ranks": p.ranks,
        "gates": p.gates,
        "y_offset": 3,
    }


def call(arguments):
    arguments = dict(arguments)
    positional = [arguments.pop(name) for name in ("y", "x", "A", "B", "indices")]
    return lk.bgmv(*positional, **arguments)


def with_value(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BAD = {  # name: (what to change in good arguments, what the message must say)
    "x_dtype": (lambda a: {"x": a["x"].half()}, "A must have the dtype"),
    "x_integer": (lambda a: {"x": a["x"].long()}, "x must be float16"),
    "x_list": (lambda a: {"x": a["x"].tolist()}, "x must be a tensor"),
    "x_three_dimensions": (lambda a: {"x": a["x"][None]}, "x must be a tensor of two dimensions"),
    "x_width": (lambda a: {"x": a["x"][:, :15]}, "A must have d_in = 15"),
    "x_float64": (lambda a: {k: a[k].double() for k in "yxAB"} | {"scale": None, "gates": None}, "float64"),
    "x_meta": (lambda a: {"x": a["x"].to("meta")}, "on cpu"),
    "A_device": (lambda a: {"A": a["A"].to("meta")}, "A must have the dtype and device"),
    "A_two_dimensions": (lambda a: {"A": a["A"][0]}, "A must have three dimensions"),
    "A_transposed": (lambda a: {"A": a["A"].transpose(1, 2).contiguous().transpose(1, 2)}, "A must be contiguous"),
    "A_empty_list": (lambda a: {"A": []}, "A must be a tensor or a non-empty sequence"),
    "B_dtype": (lambda a: {"B": a["B"].bfloat16()}, "B must have the dtype"),
    "B_slots": (lambda a: {"B": a["B"][:3]}, "B must be of shape"),
    "B_rank": (lambda a: {"B": a["B"][..., :3].contiguous()}, "B must be of shape"),
    "B_slices": (lambda a: {"B": [a["B"], a["B"]]}, "B must have as many slices as A"),
    "indices_float": (lambda a: {"indices": a["indices"].float()}, "indices must be an int32 or int64"),
    "indices_rows": (lambda a: {"indices": a["indices"][:5]}, "indices must have one row per token"),
    "indices_no_choice": (lambda a: {"indices": a["indices"][:, :0], "gates": None}, "at least one choice"),
    "indices_device": (lambda a: {"indices": a["indices"].to("meta")}, "indices must be on cpu"),
    "index_past_slots": (lambda a: {"indices": with_value(a["indices"], (5, 1), 4)}, "indices must lie between -1"),
    "index_below": (lambda a: {"indices": with_value(a["indices"], (0, 0), -2)}, "indices must lie between -1"),
    "index_huge": (lambda a: {"indices": with_value(a["indices"], (0, 0), 2**40)}, "indices must lie between -1"),
    "rank_over": (lambda a: {"ranks": with_value(a["ranks"], 1, 5)}, "ranks must lie between 0 and r_max = 4"),
    "rank_over_32_bits": (lambda a: {"ranks": with_value(a["ranks"], 1, 2**32 + 1)}, "ranks must lie between 0"),
    "rank_negative": (lambda a: {"ranks": with_value(a["ranks"], 1, -1)}, "ranks must lie between 0"),
    "ranks_shape": (lambda a: {"ranks": a["ranks"][:3]}, "ranks must be"),
    "ranks_float": (lambda a: {"ranks": a["ranks"].float()}, "ranks must be"),
    "scale_shape": (lambda a: {"scale": a["scale"][:3]}, "scale must be"),
    "scale_integer": (lambda a: {"scale": a["ranks"]}, "scale must be"),
    "gates_shape": (lambda a: {"gates": a["gates"][:, :1]}, "gates must be a float tensor of shape (6, 2)"),
    "gates_flat": (lambda a: {"gates": a["gates"].flatten()}, "gates must be a float tensor"),
    "y_dtype": (lambda a: {"y": a["y"].half()}, "y must have the dtype"),
    "y_rows": (lambda a: {"y": a["y"][:5]}, "y must have one row per token"),
    "y_narrow": (lambda a: {"y_offset": 8}, "y must have at least y_offset + sum of d_out = 8 + 12 columns"),
    "y_offset_negative": (lambda a: {"y_offset": -1}, "y_offset must be an integer that is not negative"),
    "y_offset_float": (lambda a: {"y_offset": 1.0}, "y_offset must be an integer"),
    "y_is_x": (lambda a: {"y": torch.zeros(6, 16), "y_offset": 0} | {"x": "y"}, "y must not share memory with x"),
    "plan_other": (lambda a: {"plan": lk.plan(a["indices"][:3], 4)}, "plan must be made for these"),
    "plan_int64": (
        lambda a: {"plan": lk.Plan(torch.zeros(12, dtype=torch.long), torch.zeros(5, dtype=torch.int32))},
        "plan must hold int32",
    ),
    "plan_order": (
        lambda a: {"plan": lk.Plan(torch.full((12,), 99, dtype=torch.int32), torch.full((5,), 0, dtype=torch.int32))},
        "plan must be what lorakern.plan",
    ),
    "plan_starts": (
        lambda a: {"plan": lk.Plan(torch.arange(12).int(), torch.tensor([0, 2, 1, 500, 12], dtype=torch.int32))},
        "plan must be what lorakern.plan",
    ),
    "plan_tuple": (lambda a: {"plan": (a["ranks"], a["ranks"])}, "plan must be what lorakern.plan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, message = BAD[name]
    arguments = good()
    arguments |= change(arguments)
    if arguments["x"] is not None and isinstance(arguments["x"], str):
        arguments["x"] = arguments["y"]
    before = arguments["y"].clone()
    with pytest.raises(lk.LorakernError) as error:
        call(arguments)
    assert message in str(error.value)
    assert torch.equal(arguments["y"], before)


def test_good_arguments_pass():
    arguments = good()
    before = arguments["y"].clone()
    call(arguments)
    assert not torch.equal(arguments["y"], before)


OVERLAPS = {
    "rows_shifted": lambda buffer: (buffer[1:, :32], buffer[:-1, :32]),
    "columns_meet": lambda buffer: (buffer[:, 16:48], buffer[:, :32]),
    "other_stride": lambda buffer: (buffer[:, :32], buffer.flatten().as_strided((8, 32), (48, 1))),
    "strided_columns": lambda buffer: (buffer[:, :64:2], buffer[:, 1:33]),
    "y_windows": lambda buffer: (buffer.flatten().as_strided((8, 32), (16, 1)), torch.zeros(8, 32)),
    "y_expanded": lambda buffer: (buffer[:1, :32].expand(8, 32), torch.zeros(8, 32)),
}


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_overlap_is_refused(backend, name):
    buffer = torch.randn(8, 96)
    before = buffer.clone()
    y, x = OVERLAPS[name](buffer)
    a, b = torch.randn(2, 4, 32), torch.randn(2, 32, 4)
    with lk.use_backend(backend), pytest.raises(lk.LorakernError, match="memory"):
        lk.bgmv(y, x, a, b, torch.zeros(len(x), dtype=torch.long))
    assert torch.equal(buffer, before)


def test_overlap_with_weights_is_refused():
    a = torch.randn(2, 4, 32)
    with pytest.raises(lk.LorakernError, match="share memory with A"):
        lk.bgmv(a.view(8, 32), torch.randn(8, 32), a, torch.randn(2, 32, 4), torch.zeros(8, dtype=torch.long))


def test_values_are_checked_by_the_reference_too():
    arguments = good()
    with lk.use_backend("reference"):
        for change in ("index_past_slots", "rank_over"):
            with pytest.raises(lk.LorakernError):
                call(arguments | BAD[change][0](arguments))


@pytest.mark.parametrize("seg_starts", [[0, 4, 3], [-1, 3, 6], [0, 3, 7], [0, 6]])
def test_bad_segments(seg_starts):
    a = good()
    y, before = a["y"], a["y"].clone()
    with pytest.raises(lk.LorakernError, match="seg_starts"):
        lk.sgmv(y, a["x"], a["A"], a["B"], torch.tensor(seg_starts), torch.tensor([0, 1]))
    assert torch.equal(y, before)


def test_shrink_and_expand_arguments():
    a = good()
    h = lk.shrink(a["x"], a["A"], a["indices"])
    with pytest.raises(lk.LorakernError, match="out must be a contiguous float32 tensor"):
        lk.shrink(a["x"], a["A"], a["indices"], out=h[..., :3])
    with pytest.raises(lk.LorakernError, match="h must be a contiguous float32 tensor"):
        lk.expand(a["y"], h.half(), a["B"], a["indices"])
    with pytest.raises(lk.LorakernError, match="indices must lie"):
        lk.shrink(a["x"], a["A"], a["indices"] + 4)
    with pytest.raises(lk.LorakernError, match="plan: num_slots"):
        lk.plan(a["indices"], 0)


def test_too_many_slices():
    a = good()
    with pytest.raises(lk.LorakernError, match="at most 8 slices"):
        lk.bgmv(torch.zeros(6, 108), a["x"], [a["A"]] * 9, [a["B"]] * 9, a["indices"])


@pytest.mark.parametrize("name", ["nothing", "cuda", "triton"])
def test_unusable_backend_says_why(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is usable here")
    with pytest.raises(lk.LorakernError, match=name), lk.use_backend(name):
        raise AssertionError("the backend was accepted")
