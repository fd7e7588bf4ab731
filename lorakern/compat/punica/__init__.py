"""The LoRA ops of Punica (commit 591b5989), and the classes that hold its weights."""

from lorakern.compat.punica import ops, utils

__all__ = ["ops", "utils"]
