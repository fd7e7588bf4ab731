"""Other projects' multi-LoRA ops under their own names, on lorakern: code written for them changes an import.

``vllm.lora.ops.torch_ops``   -> ``lorakern.compat.vllm.torch_ops``
``vllm.lora.ops.triton_ops``  -> ``lorakern.compat.vllm.triton_ops``
``punica.ops``                -> ``lorakern.compat.punica.ops``
``punica.utils``              -> ``lorakern.compat.punica.utils``

Neither project needs to be installed. New code should call `lorakern.bgmv` and `lorakern.sgmv`: one fused call.
"""
