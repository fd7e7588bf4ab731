"""`LoraAdapter`: a LoRA adapter in memory, loaded from and saved to PEFT directories."""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from lorakern.adapters.adapter_file import open_adapter
from lorakern.adapters.adapter_writer import AdapterWriter
from lorakern.adapters.factors import LoraFactors, checked
from lorakern.adapters.peft_config import AdapterConfig, make_config
from lorakern.errors import LorakernError


class LoraAdapter(Mapping[str, LoraFactors]):
    """A LoRA adapter: an immutable mapping from module path to `LoraFactors`, in file order.

    Module paths are those of the base model, such as "model.layers.0.self_attn.q_proj". `config` holds the fields of
    the PEFT config that matter, `path` the directory or file that the adapter came from (None if made in memory).

    Args:
        factors: module path to `LoraFactors`, or to a tuple (A, B, scale); ranks, scales and dtypes may differ.
        base_model_name_or_path: the model that the adapter is for, as it is to be written to the config.
        fan_in_fan_out: whether the layers store their weight as (d_in, d_out), as GPT-2's `Conv1D` does.
        use_rslora: write alpha = scale * sqrt(r) rather than scale * r; the scales themselves stay as given.
        task_type: one of PEFT's, such as "CAUSAL_LM", or None.

    Raises `LorakernError` for no modules, a bad module path, shapes that do not fit, an integer dtype or rank 0.

    Format: https://github.com/huggingface/peft (0.21.2).

    >>> import tempfile, torch
    >>> from lorakern.adapters import LoraAdapter
    >>> name = "model.layers.0.self_attn.q_proj"
    >>> adapter = LoraAdapter({name: (torch.ones(2, 8), torch.ones(6, 2), 0.5)}, base_model_name_or_path="my/model")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter.save(folder)
    ...     again = LoraAdapter.load(folder)
    >>> again[name].rank, again[name].scale, again.config.lora_alpha
    (2, 0.5, 1)
    """

    config: AdapterConfig
    path: Path | None

    def __init__(
        self,
        factors: Mapping[str, LoraFactors | tuple[torch.Tensor, torch.Tensor, float]],
        *,
        base_model_name_or_path: str | None = None,
        fan_in_fan_out: bool = False,
        use_rslora: bool = False,
        task_type: str | None = None,
    ) -> None:
        if not factors:
            raise LorakernError("factors holds no module; an adapter needs at least one")
        self._factors = {name: checked(name, value) for name, value in factors.items()}
        self.path = None
        self.config = make_config(
            {name: (value.rank, value.scale) for name, value in self._factors.items()},
            base_model_name_or_path=base_model_name_or_path,
            fan_in_fan_out=fan_in_fan_out,
            use_rslora=use_rslora,
            task_type=task_type,
        )

    def __getitem__(self, module: str) -> LoraFactors:
        return self._factors[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    # by identity: comparing tensors as a Mapping would has no single truth value
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        ranks = {factors.rank for factors in self.values()}
        span = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        base = self.config.base_model_name_or_path
        return f"LoraAdapter({len(self)} modules, rank {span}, base {base!r}, path {self.path})"

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, check_finite: bool = True, modules: Collection[str] | None = None
    ) -> "LoraAdapter":
        """Load a PEFT adapter: scale = alpha / r, or alpha / sqrt(r) under use_rslora, module by module.

        Tensors are views of the memory-mapped file (private: writing to one changes no file), so a page is read when
        it is first touched. Do not let another program overwrite the file in place meanwhile; `save` never does.

        Args:
            path: a directory with adapter_config.json and adapter_model.safetensors, or a .safetensors file: PEFT's
                with adapter_config.json beside it, kohya's or diffusers' without, see `open_adapter`. Pickle files
                (.bin, .pt) are refused unopened.
            check_finite: read every tensor once and refuse NaN and infinity.
            modules: module names by which to resolve those of a kohya or diffusers file, see `open_adapter`.

        Raises `LorakernError`, naming the file and the field or tensor, for a file that is damaged, or that is not a
        plain LoRA (DoRA, lora_bias, modules_to_save, PiSSA without conversion and the like).

        >>> import tempfile, torch
        >>> from lorakern.adapters import LoraAdapter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LoraAdapter({"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}).save(folder)
        ...     for module, (A, B, scale) in LoraAdapter.load(folder).items():
        ...         print(module, tuple(A.shape), tuple(B.shape), scale)
        proj (2, 8) (6, 2) 0.5
        """
        adapter = cls.__new__(cls)
        with open_adapter(path, check_finite=check_finite, modules=modules) as opened:
            adapter._factors, adapter.config, adapter.path = opened.map(), opened.config, opened.path
        return adapter

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the adapter in PEFT format: `path`/adapter_config.json and `path`/adapter_model.safetensors.

        Tensors keep their dtype and bits. A loaded adapter keeps its config; for one made in memory r and lora_alpha
        are the most common ones, and rank_pattern and alpha_pattern name the modules that differ.

        An adapter that is there already is replaced, as `AdapterWriter` does it: after a crash at any moment there is
        the old adapter, the new one, or a directory without a config, which nothing loads.

        Args:
            path: a directory; it is made if it does not exist.

        Raises `LorakernError` if `path` is a file, cannot be written, or another writer is at work there.

        >>> import os, tempfile, torch
        >>> from lorakern.adapters import LoraAdapter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LoraAdapter({"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}).save(folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
        """
        with AdapterWriter(path, check_finite=False) as writer:
            writer.config = self.config
            for module, factors in self.items():
                writer.add(module, factors)
