"""Portable GPU kernels in Triton (sm_80 and up), one file per op family; imported as lorakern.triton_kernels.

`configs.py` is the table of shipped configurations, `common.py` what the kernels share, `aot.py` compiles every
configuration without a GPU. Kernels get tensors and numbers; they check nothing and know nothing of the package.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is lorakern.triton_kernels; it is not the triton_kernels package of OpenAI. "
        "Import lorakern, or remove lorakern's checkout from sys.path"
    )

from .backward import backward
from .bgmv import bgmv
from .clustering import kmeans_assign, kmeans_lloyd, kmeans_seed, kmeans_update, points_gram
from .common import INTERPRET
from .configs import SHARED_LIMIT
from .expand import expand
from .lloyd import MOST_POINTS
from .plan import countable, plan
from .routed import attention_gates, routed_bgmv
from .shrink import shrink
from .warmup import warmup

__all__ = [
    "INTERPRET",
    "MOST_POINTS",
    "SHARED_LIMIT",
    "attention_gates",
    "backward",
    "bgmv",
    "countable",
    "expand",
    "kmeans_assign",
    "kmeans_lloyd",
    "kmeans_seed",
    "kmeans_update",
    "plan",
    "points_gram",
    "routed_bgmv",
    "shrink",
    "warmup",
]
