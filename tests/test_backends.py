"""Which backend serves a call: the order, what a backend refuses, and what was measured to be faster."""

import threading

import pytest
import torch

import lorakern as lk
from lorakern import backends
from lorakern.backends import Layer, crossover, cuda, reference, select, triton
from lorakern.backends.crossover import Crossover
from lorakern.errors import LorakernError

GPU = torch.device("cuda", 0)
LAYER = Layer(torch.bfloat16, 16)
OPS = ("plan", "shrink", "expand", "bgmv", "backward")


@pytest.fixture
def hopper(monkeypatch):
    """A machine whose device is an sm_90, with every backend."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "missing", lambda: None)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))


@pytest.mark.parametrize("op", OPS)
def test_cuda_comes_first_and_triton_stands_in(hopper, monkeypatch, op):
    assert select(op, GPU, LAYER) is cuda
    monkeypatch.setattr(cuda, "missing", lambda: "not built")
    assert select(op, GPU, LAYER) is triton


@pytest.mark.parametrize("layer", [Layer(torch.bfloat16, cuda.MAX_RANK + 1), Layer(torch.float16, 8, 1000)])
def test_what_cuda_refuses_goes_to_triton(hopper, layer):
    assert select("bgmv", GPU, layer) is triton
    assert select("plan", GPU, layer) is cuda


def test_an_error_says_why_each_backend_is_out(hopper, monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    with pytest.raises(LorakernError, match=r"rank r_max up to 1024; got 2000.*triton is not installed"):
        select("bgmv", GPU, Layer(torch.bfloat16, 2000))
    with pytest.raises(LorakernError, match="cpu or cuda; got meta"):
        select("bgmv", torch.device("meta"), LAYER)


def test_a_measured_crossover_decides(hopper, monkeypatch):
    row = Crossover("bgmv", (9, 0), "triton", dtypes=(torch.bfloat16,), r_max=range(64, 257))
    monkeypatch.setattr(crossover, "MEASURED", (row,))
    assert select("bgmv", GPU, Layer(torch.bfloat16, 64)) is triton
    for layer in (Layer(torch.bfloat16, 32), Layer(torch.float16, 64), Layer(torch.bfloat16, 257)):
        assert select("bgmv", GPU, layer) is cuda
    assert select("expand", GPU, Layer(torch.bfloat16, 64)) is cuda
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 0))
    assert select("bgmv", GPU, Layer(torch.bfloat16, 64)) is cuda


def test_a_faster_backend_that_is_missing_is_not_chosen(hopper, monkeypatch):
    monkeypatch.setattr(crossover, "MEASURED", (Crossover("bgmv", (9, 0), "triton"),))
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    assert select("bgmv", GPU, LAYER) is cuda


def test_every_measured_row_names_a_backend_that_has_the_op():
    for row in crossover.MEASURED:
        assert hasattr(backends.BACKENDS[row.backend], row.op)


def test_a_backward_runs_on_the_backend_of_its_forward():
    """Autograd calls the backward of a GPU's tensors in a thread of its own, which no use_backend has reached."""
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    A, B = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    indices = torch.tensor([0, 1, 0])
    with lk.use_backend("reference"):  # alone in taking float64
        delta = lk.lora_delta(x, A, B, indices)
    thread = threading.Thread(target=delta.sum().backward)
    thread.start()
    thread.join()
    assert torch.allclose(x.grad, (B.sum(1)[:, None] @ A)[indices, 0])


def test_a_choice_by_hand_comes_before_all():
    with lk.use_backend("reference"):
        assert select("bgmv", GPU, LAYER) is reference
