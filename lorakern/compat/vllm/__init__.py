"""The LoRA ops of vLLM 0.32: `torch_ops` (its CPU path) and `triton_ops` (its GPU path)."""
