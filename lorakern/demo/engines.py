"""The three that the demo compares, on one set of base weights: the base model, PEFT, and lorakern."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lorakern.adapters import LoraAdapter
from lorakern.demo.requests import Request
from lorakern.integrations.transformers import attach

NEW_TOKENS = 32


class Engines:
    """One model in three guises that share their weights, and a batch of requests for them.

    Args:
        model, tokenizer: a causal language model of transformers in eval mode, and its tokenizer.
        adapters: name to `LoraAdapter`; those of PEFT are read from `folder`/name.
        folder: the directory of the PEFT adapters.
        requests: the rows of the batch.
    """

    def __init__(
        self, model, tokenizer, adapters: Mapping[str, LoraAdapter], folder: Path, requests: list[Request]
    ) -> None:
        from peft import PeftModel

        self.tokenizer = tokenizer
        self.requests = requests
        self.rows = [request.adapter for request in requests]
        self.base = _twin(model)
        self.attached = attach(_twin(model), adapters)
        first, *rest = adapters
        # PEFT would keep factors in float32 beside a bfloat16 base; all engines compute in the dtype of the base.
        options = {"autocast_adapter_dtype": False}
        wrapped = _twin(model)
        self.peft = PeftModel.from_pretrained(wrapped, folder / first, adapter_name=first, **options)
        for name in rest:
            self.peft.load_adapter(folder / name, adapter_name=name, **options)
        self.peft.to(model.dtype).eval()
        self.inputs = tokenizer([r.prompt for r in requests], return_tensors="pt", padding=True, padding_side="left")

    def run(self, engine: str, call: str = "generate", **options) -> torch.Tensor:
        """What `generate` or `logits` of the mixed batch returns on "base", "peft" or "lorakern"."""
        with torch.no_grad():
            if engine == "peft":
                names = ["__base__" if row is None else row for row in self.rows]
                return _call(self.peft, call, **self.inputs, adapter_names=names, **options)
            if engine == "base":
                return _call(self.base, call, **self.inputs, **options)
            with self.attached.use(self.rows):
                return _call(self.attached.model, call, **self.inputs, **options)

    def answers(self) -> list[list[int]]:
        """lorakern's greedy tokens of every row of the mixed batch, through the end-of-turn token."""
        tokens = self.run("lorakern", max_new_tokens=NEW_TOKENS, do_sample=False)
        return [self._reply(row) for row in tokens[:, self.inputs["input_ids"].shape[1] :]]

    def answer_alone(self, request: Request) -> list[int]:
        """PEFT's greedy tokens of one request that runs alone, without padding, its adapter the only active one."""
        inputs = self.tokenizer([request.prompt], return_tensors="pt")
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        if request.adapter is None:
            with self.peft.disable_adapter():
                tokens = self.peft.generate(**inputs, **options)
        else:
            self.peft.set_adapter(request.adapter)
            tokens = self.peft.generate(**inputs, **options)
        return self._reply(tokens[0, inputs["input_ids"].shape[1] :])

    def _reply(self, tokens: torch.Tensor) -> list[int]:
        """The tokens up to and with the first end-of-turn token: what comes after it is padding."""
        end = self.base.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        reply = tokens.tolist()
        stop = next((i for i, token in enumerate(reply) if token in ends), len(reply))
        return reply[: stop + 1]

    def times(self, repeats: int, step: Callable[[], None]) -> dict[str, list[float]]:
        """Seconds of each engine for exactly 32 new tokens a row; the engines take turns, each starting as often.

        Args:
            repeats: how many times each engine runs; one short run each comes before.
            step: called after every run.
        """
        order = ["base", "peft", "lorakern"]
        for engine in order:
            self.run(engine, max_new_tokens=2, do_sample=False)
            step()
        seconds = {engine: [] for engine in order}
        for repeat in range(repeats):
            for engine in itertools.islice(itertools.cycle(order), repeat % 3, repeat % 3 + 3):
                start = time.perf_counter()
                self.run(engine, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
                seconds[engine].append(time.perf_counter() - start)
                step()
        return seconds

    def speed(self, seconds: Mapping[str, list[float]]) -> dict[str, dict]:
        """Tokens a second by the median time of each engine, and the ratio to the base model."""
        tokens = len(self.rows) * NEW_TOKENS
        rates = {engine: tokens / statistics.median(times) for engine, times in seconds.items()}
        return {
            engine: {"tokens_per_s": rate, "ratio_to_base": rate / rates["base"], "seconds": list(seconds[engine])}
            for engine, rate in rates.items()
        }


def _call(model, call: str, **inputs) -> torch.Tensor:
    if call == "logits":
        return model(**inputs, logits_to_keep=1).logits[:, -1].float()
    return model.generate(**inputs)


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """Another module tree over the very same weights, so that one engine's hooks and layers are not another's."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
