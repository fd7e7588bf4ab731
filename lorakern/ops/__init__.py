"""The ops: schema, docstring, argument checks, fake and autograd of each. Start reading at bgmv.py."""

from lorakern.ops.bgmv import bgmv, lora_delta, sgmv
from lorakern.ops.plan import Plan, plan
from lorakern.ops.shrink_expand import expand, shrink
from lorakern.ops.warmup import warmup

__all__ = ["Plan", "bgmv", "expand", "lora_delta", "plan", "sgmv", "shrink", "warmup"]
