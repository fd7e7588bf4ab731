"""LoRA adapters in memory, and the files they are kept in.

`LoraAdapter` is an adapter in memory, `open_adapter` one that is read module by module, `AdapterWriter` writes one
module by module. Files in: PEFT directories, kohya and diffusers .safetensors; files out: PEFT directories.
"""

from lorakern.adapters.adapter import LoraAdapter
from lorakern.adapters.adapter_file import AdapterFile, open_adapter
from lorakern.adapters.adapter_writer import AdapterWriter
from lorakern.adapters.factors import LoraFactors
from lorakern.adapters.same_base import check_same_base

__all__ = ["AdapterFile", "AdapterWriter", "LoraAdapter", "LoraFactors", "check_same_base", "open_adapter"]
