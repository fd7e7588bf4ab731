"""What the commands share that merge adapters on a model with data: the model, the adapters and what is written."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakern.adapters import AdapterWriter, LoraAdapter
from lorakern.adapters.json_file import show
from lorakern.adapters.peft_files import WEIGHTS_NAME
from lorakern.commands.card import Input, card
from lorakern.commands.console import Console, size, span
from lorakern.commands.sources import base_model, check_output, opened, sources
from lorakern.errors import LorakernError

EMBEDDED = "smollm2"


@dataclass(frozen=True)
class Run:
    """A model, adapters and data as a command line names them, and where the result goes.

    `model_dtype` and `device` are the model's, `dtype` that of what is written; `data` are paths of JSONL files.
    """

    model: str
    adapters: Sequence[str]
    data: Sequence[Path]
    out: Path
    console: Console
    command: str
    model_dtype: torch.dtype = torch.float32
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    base_model: str | None = None
    force: bool = False

    def check(self) -> None:
        """Raise for an `out` that may not be written and data that are not there, before the model is loaded."""
        check_output(self.out, sources(self.adapters), self.force)
        for path in self.data:
            if not path.is_file():
                raise LorakernError(f"--data {path} is no file; give a JSONL file, one record a line")

    def load(self) -> tuple[torch.nn.Module, Any, list[LoraAdapter], list[Input], str | None]:
        """The model, its tokenizer, the adapters, what the card says of them, and the name of their base model."""
        self.check()
        found = sources(self.adapters)
        with opened(found) as files:
            base = base_model(found, files, self.base_model, "--base-model")
            inputs = [Input(source.name, file.sha256()) for source, file in zip(found, files, strict=True)]
        adapters = [LoraAdapter.load(source.path) for source in found]
        model, tokenizer = load_model(self.model, self.model_dtype)
        return model.to(self.device or "cpu"), tokenizer, adapters, inputs, base

    def write(
        self,
        adapter: LoraAdapter,
        title: str,
        what: str,
        inputs: Sequence[Input],
        options: Mapping[str, Any],
        out: Path,
    ) -> dict[str, Any]:
        """Write an adapter with its card, beside and renamed; the ranks and bytes of what is there then."""
        config = adapter.config
        fields = {name: getattr(config, name) for name in ("base_model_name_or_path", "fan_in_fan_out", "task_type")}
        with AdapterWriter(out, **fields) as writer:
            for module, (A, B, scale) in adapter.items():
                writer.add(module, (A.to(self.dtype or A.dtype), B.to(self.dtype or B.dtype), scale))
            writer.card = card(title, what, inputs, options, self.command, base_model=config.base_model_name_or_path)
        written = (out / WEIGHTS_NAME).stat().st_size
        return {"output": str(out), "ranks": {m: f.rank for m, f in adapter.items()}, "bytes": written}


def load_model(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """A causal language model and its tokenizer: a directory or name of transformers, or "smollm2", the embedded one.

    Raises:
        LorakernError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakern.integrations import smollm2

    if name == EMBEDDED:
        return smollm2.load(dtype)
    try:
        with smollm2.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
            return model.eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LorakernError(
            f"MODEL {show(name)} cannot be loaded ({reason}); give the directory of a causal language model of "
            f"transformers with its tokenizer and .safetensors weights, or {EMBEDDED}"
        ) from None


def told(result: Mapping[str, Any]) -> str:
    """A line about an adapter that was written."""
    ranks = list(result["ranks"].values())
    return f"{result['output']}: {len(ranks)} modules, rank {span(ranks)}, {size(result['bytes'])}"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)
