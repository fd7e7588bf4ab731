"""The ops: schema, docstring, argument checks, fake and autograd of each. Start reading at bgmv.py."""

from lorakern.ops.bgmv import bgmv, lora_delta, sgmv
from lorakern.ops.distance import delta_distance, delta_norm
from lorakern.ops.equivalence import check_concat_sum
from lorakern.ops.equivalence_report import EquivalenceReport, ModuleCheck
from lorakern.ops.kmeans import KMeansResult, kmeans
from lorakern.ops.kmeans_steps import kmeans_assign, kmeans_update
from lorakern.ops.plan import Plan, plan
from lorakern.ops.routed import routed_bgmv, routed_delta
from lorakern.ops.router import attention_gates, router_cores
from lorakern.ops.shrink_expand import expand, shrink
from lorakern.ops.truncate import Truncated, truncate
from lorakern.ops.warmup import warmup

__all__ = [
    "EquivalenceReport",
    "KMeansResult",
    "ModuleCheck",
    "Plan",
    "Truncated",
    "attention_gates",
    "bgmv",
    "check_concat_sum",
    "delta_distance",
    "delta_norm",
    "expand",
    "kmeans",
    "kmeans_assign",
    "kmeans_update",
    "lora_delta",
    "plan",
    "routed_bgmv",
    "routed_delta",
    "router_cores",
    "sgmv",
    "shrink",
    "truncate",
    "warmup",
]
