"""plan: the grouping of tokens by slot that every layer of a step shares."""

from typing import NamedTuple

import torch

from lorakern.ops import _checks as check
from lorakern.ops._library import backend_for, define


class Plan(NamedTuple):
    """Pairs (token t, choice k) grouped by slot; pair p = t * K + k.

    Attributes:
        order: (T * K,) int32, pair ids sorted stably by slot, pairs without an adapter last.
        starts: (slots + 1,) int32; slot i owns ``order[starts[i]:starts[i + 1]]``.
    """

    order: torch.Tensor
    starts: torch.Tensor


def _fake_plan(indices, num_slots):
    return indices.new_empty(indices.numel(), dtype=torch.int32), indices.new_empty(num_slots + 1, dtype=torch.int32)


@define("plan(Tensor indices, SymInt num_slots) -> (Tensor, Tensor)", _fake_plan)
def _plan(indices, num_slots):
    backend = backend_for("plan", indices)
    if not backend.VALIDATES:
        check.check_values("plan", indices, num_slots, None, None)
    return backend.plan(indices, num_slots)


def plan(indices, num_slots: int) -> Plan:
    """Group the tokens of a batch by slot, on the device and without waiting for it.

    Pass the result as ``plan=`` to every call of the same step: the grouping is then done once, not once a layer.

    Args:
        indices: (T,) or (T, K) int32 or int64; the slot of each token and choice, -1 for none.
        num_slots: how many slots the weights have.

    Raises:
        LorakernError: an argument of another type or shape, or (on the CPU) an index that is no slot.

    >>> import torch, lorakern as lk
    >>> grouped = lk.plan(torch.tensor([1, -1, 0, 1]), 2)
    >>> grouped.order.tolist(), grouped.starts.tolist()
    ([2, 0, 3, 1], [0, 1, 3])
    """
    indices = check.check_indices("plan", indices, None, None)
    if not isinstance(num_slots, (int, torch.SymInt)) or isinstance(num_slots, bool) or num_slots < 1:
        check.fail("plan", "num_slots", "be a positive integer", repr(num_slots))
    return Plan(*_plan(indices, num_slots))


def check_plan(op, given, indices, slots):
    """The tensors of a plan that fits these indices and slots, or (None, None)."""
    if given is None:
        return None, None
    if not isinstance(given, Plan):
        check.fail(op, "plan", "be what lorakern.plan(indices, num_slots) returned", type(given).__name__)
    if given.order.shape != (indices.numel(),) or given.starts.shape != (slots + 1,):
        got = f"a plan of {given.order.shape[0]} pairs and {given.starts.shape[0] - 1} slots"
        check.fail(op, "plan", f"be made for these {indices.numel()} pairs and {slots} slots", got)
    if given.order.dtype != torch.int32 or given.starts.dtype != torch.int32:
        check.fail(op, "plan", "hold int32 tensors", f"{given.order.dtype} and {given.starts.dtype}")
    if given.order.device != indices.device:
        check.fail(op, "plan", f"be on {indices.device} like indices", str(given.order.device))
    return given.order, given.starts
