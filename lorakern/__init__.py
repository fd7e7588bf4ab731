"""Kernels for multi-LoRA math: batched adapters, gated mixtures, merges on the factors."""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

if _find_spec("lorakern.triton_kernels") is None:  # an uninstalled checkout keeps that folder beside this one
    __path__.append(str(_Path(__file__).resolve().parents[1]))

from lorakern import merge
from lorakern.adapters import LoraAdapter, LoraFactors
from lorakern.backends import use_backend
from lorakern.errors import LorakernError
from lorakern.info import info
from lorakern.ops import (
    EquivalenceReport,
    KMeansResult,
    ModuleCheck,
    Plan,
    Truncated,
    attention_gates,
    bgmv,
    check_concat_sum,
    delta_distance,
    delta_norm,
    expand,
    kmeans,
    kmeans_assign,
    kmeans_update,
    lora_delta,
    plan,
    routed_bgmv,
    routed_delta,
    router_cores,
    sgmv,
    shrink,
    truncate,
    warmup,
)

__version__ = "0.1.0"
__all__ = [
    "EquivalenceReport",
    "KMeansResult",
    "LoraAdapter",
    "LoraFactors",
    "LorakernError",
    "ModuleCheck",
    "Plan",
    "Truncated",
    "attention_gates",
    "bgmv",
    "check_concat_sum",
    "delta_distance",
    "delta_norm",
    "expand",
    "info",
    "kmeans",
    "kmeans_assign",
    "kmeans_update",
    "lora_delta",
    "merge",
    "plan",
    "routed_bgmv",
    "routed_delta",
    "router_cores",
    "sgmv",
    "shrink",
    "truncate",
    "use_backend",
    "warmup",
]
