"""Uniform random numbers as a function of seed, run and draw: the same on every backend and for every batch."""

import torch


def _signed(constant):
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(bits, by):
    """A logical shift to the right of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(bits):
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def uniforms(seed: int, runs: int, draws: int) -> torch.Tensor:
    """(runs, draws) float64 in [0, 1), on the CPU; more runs or draws change none of the others.

    >>> from lorakern.ops._uniforms import uniforms
    >>> bool((uniforms(3, 2, 5)[:, :4] == uniforms(3, 2, 4)).all())
    True
    >>> bool((uniforms(3, 1, 4) == uniforms(4, 1, 4)).any())
    False
    """
    stream = _mixed(_mixed(torch.tensor([_signed(seed % (1 << 64))])) + _STEP * torch.arange(1, runs + 1))
    bits = _mixed(stream[:, None] + _STEP * torch.arange(1, draws + 1))
    return _shifted(bits, 11).double() * 2.0**-53
