"""Shared test set-up: uninitialised memory is NaN, so that reading or leaving it shows."""

import emulated_cuda as emulator
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and friends hand out NaN (and the largest integer) instead of what happened to be there."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="module")
def one_thread():
    """For tests of matrices so small that waiting for a second thread on a busy machine only slows them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The CUDA backend takes CPU tensors and runs its kernels on the emulator of native/cuda."""
    emulator.install(monkeypatch)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
