"""The ops: schema, docstring, argument checks, fake and autograd of each. Start reading at bgmv.py."""

from lorakern.ops.bgmv import bgmv, lora_delta, sgmv
from lorakern.ops.distance import delta_distance, delta_norm
from lorakern.ops.equivalence import check_concat_sum
from lorakern.ops.equivalence_report import EquivalenceReport, ModuleCheck
from lorakern.ops.plan import Plan, plan
from lorakern.ops.shrink_expand import expand, shrink
from lorakern.ops.truncate import Truncated, truncate
from lorakern.ops.warmup import warmup

__all__ = [
    "EquivalenceReport",
    "ModuleCheck",
    "Plan",
    "Truncated",
    "bgmv",
    "check_concat_sum",
    "delta_distance",
    "delta_norm",
    "expand",
    "lora_delta",
    "plan",
    "sgmv",
    "shrink",
    "truncate",
    "warmup",
]
