"""LoRA adapters in memory, and the files they are kept in."""

from lorakern.adapters.adapter import LoraAdapter
from lorakern.adapters.factors import LoraFactors

__all__ = ["LoraAdapter", "LoraFactors"]
