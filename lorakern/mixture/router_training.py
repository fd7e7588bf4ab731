"""Training of what weighs adapters, with the base model and the adapters frozen."""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from lorakern.adapters import LoraFactors
from lorakern.adapters.json_file import show
from lorakern.adapters.state_file import digest_of
from lorakern.errors import LorakernError
from lorakern.merge._arguments import check_integer, check_number
from lorakern.merge._batches import IGNORED, Batch, Batches
from lorakern.merge.soups import loss_of
from lorakern.mixture.layers import MixtureLayers, tokens_of
from lorakern.mixture.router_start import read_differences
from lorakern.mixture.routers import Routers, mode_named
from lorakern.mixture.training_state import TrainingState

Progress = Callable[[int, int, float], None]
_OP = "train_router"
_SURVIVORS = 2
_START_BATCHES = 16


def train_router(
    model: torch.nn.Module,
    adapters: Mapping[str, Mapping[str, LoraFactors]],
    data: Any,
    *,
    tokenizer: Callable | None = None,
    mode: str = "ramole",
    rank: int = 8,
    steps: int = 100,
    batch_size: int = 8,
    lr: float = 5e-3,
    warmup: int = 10,
    clip: float = 1.0,
    dropout: float = 0.5,
    empty: int = 0,
    cutoff: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 50,
) -> tuple[Routers, list[float]]:
    """Learn routers on the language-model loss of mixed tasks, all adapters in every row, some of them dropped.

    In every step and row each adapter is left out with probability `dropout`, at least two stay: otherwise the router
    learns to name the one adapter of each task, and is lost where that one is missing (random LoRA dropout of RAMoLE).
    Rows without it have by far the highest loss, so `dropout` also says how much they count.
    AdamW; the learning rate rises linearly over the warm-up and falls as a cosine to 0 at the end. "ramole" starts with
    an A that reads the directions in which the inputs of examples differ most, see `read_differences`.

    Args:
        model: a causal language model of transformers. On return, and on any error, it is what it was.
        adapters: name to adapter; at least two. Modes with a gate for each adapter learn it for these.
        data: as in `lorakern.merge.soups.learn`: records {"prompt", "answer"} of the tasks, mixed, and so on.
        tokenizer: of the model; needed for texts and records.
        mode: "ramole", "mole", "lora_flow", "meteora" or "milora".
        rank: r_r of "ramole".
        steps: steps in all, those of earlier runs with this `state` included; over the data as often as needed.
        batch_size: examples a step; tokenised batches keep theirs.
        lr: the highest learning rate.
        warmup: steps over which it rises.
        clip: the norm to which gradients are cut down.
        dropout: from 0 to below 1.
        empty: for "ramole", how many adapters that add nothing each row has besides. Their logits are 0, like those of
            an adapter unknown to the router on average, so that the logit of a useful one has to rise above 0.
        cutoff: the most tokens of a sequence.
        seed: of the start, of the order of the examples and of what is dropped.
        progress: called as progress(done, steps, loss) after each step.
        state: a folder that keeps parameters and optimizer; a call with the same arguments goes on from there, to the
            same bits as one that was never stopped (`save_every` may differ).
        save_every: steps between writes to `state`; the last step is always written.

    Returns:
        The `Routers`, and the loss of every step before it was taken.

    Raises:
        LorakernError: for arguments of another form, adapters that do not fit, a mode that learns nothing, a state of
            other arguments, and a loss or gradient that is not finite.

    RAMoLE: arXiv 2406.16989.
    """
    least = {"rank": 1, "steps": 1, "batch_size": 1, "warmup": 0, "empty": 0, "cutoff": 2}
    least |= {"save_every": 1, "seed": None}
    given = {"rank": rank, "steps": steps, "batch_size": batch_size, "warmup": warmup}
    given |= {"empty": empty, "cutoff": cutoff}
    for name, value in (given | {"save_every": save_every, "seed": seed}).items():
        check_integer(_OP, name, value, least[name])
    check_number(_OP, "lr", lr)
    check_number(_OP, "clip", clip)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise LorakernError(f"{_OP}: dropout must be a number from 0 to below 1, got {show(dropout)}")
    if not isinstance(adapters, Mapping) or len(adapters) < 2:
        raise LorakernError(f"{_OP}: adapters must map at least two names to adapters, got {show(adapters)}")
    if not mode_named(mode).learned:
        raise LorakernError(f"{_OP}: mode {mode!r} learns nothing; use it as it is")
    if empty and mode != "ramole":
        raise LorakernError(f"{_OP}: empty is for mode 'ramole', which has no gate for each adapter; leave it out")
    batches = Batches(_OP, data, tokenizer, batch_size, cutoff)
    routers = Routers.init(model, mode, adapters=tuple(adapters), rank=rank, seed=seed)
    arguments = given | {"mode": mode, "lr": lr, "clip": clip, "dropout": dropout, "seed": seed}
    arguments |= {"adapters": {name: _digest(adapter) for name, adapter in adapters.items()}, "batches": len(batches)}
    file = None if state is None else TrainingState(state, _OP, arguments)
    if mode == "ramole":
        order = torch.Generator().manual_seed(seed)
        read_differences(model, routers, islice(batches.epoch(order), _START_BATCHES))
    run = _Run(model, adapters, routers, dropout, empty, seed)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            losses = run.train(batches, steps, lr, warmup, clip, progress, file, save_every)
    finally:
        run.close()
    return run.routers(), losses


class _Run:
    """The model with all adapters in slots, frozen, and the parameters that learn."""

    def __init__(self, model, adapters, routers: Routers, dropout: float, empty: int, seed: int) -> None:
        self.model, self.start, self.dropout, self.empty, self.seed = model, routers, dropout, empty, seed
        self.count = len(adapters)
        # nothing is loaded into the last slot: it is that of the empty ones
        self.slots = self.count + (empty > 0)
        self.layers = MixtureLayers(model, routers.mode, self.slots, routers)
        self.was_training = model.training
        self.frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for slot, (name, adapter) in enumerate(adapters.items()):
                self.layers.load(slot, name, self.layers.fit(_OP, name, adapter))
            for parameter in self.frozen:
                parameter.requires_grad_(False)
            model.eval()
        except BaseException:
            self.close()
            raise
        # names of parameters may hold no dot
        device = next(model.parameters()).device
        self.learned = torch.nn.Module()
        for name, tensor in routers.parameters().items():
            self.learned.register_parameter(name.replace(".", ":"), torch.nn.Parameter(tensor.to(device)))

    def routers(self, *, detached: bool = True) -> Routers:
        """The parameters as they are; for the loss not `detached`."""
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self.learned.named_parameters():
            layer, _, kind = name.replace(":", ".").rpartition("/")
            layers.setdefault(layer, {})[kind] = parameter.detach() if detached else parameter
        return Routers(self.start.mode, layers, self.start.adapters)

    def train(self, batches, steps, lr, warmup, clip, progress, file, save_every) -> list[float]:
        trained = dict(self.learned.named_parameters())
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
        losses = [] if file is None else file.load(self.learned, trained, optimizer)
        for done, batch in enumerate(self._endless(batches)):
            if done >= steps:
                break
            if done < len(losses):
                continue
            optimizer.param_groups[0]["lr"] = lr * _share_of_rate(done, steps, warmup)
            optimizer.zero_grad()
            with self.layers.follow(self.routers(detached=False)), self.layers.run(self._tokens(batch, done)):
                loss = loss_of(self.model, batch)
            value = loss.item()
            if math.isfinite(value):
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip)
            if not math.isfinite(value) or not norm.isfinite():
                raise LorakernError(
                    f"{_OP}: the loss ({value}) or its gradient is not finite at step {done + 1} of {steps}; take a "
                    "smaller lr, or a model in float32"
                )
            optimizer.step()
            losses.append(value)
            if progress is not None:
                progress(done + 1, steps, value)
            if file is not None and ((done + 1) % save_every == 0 or done + 1 == steps):
                file.save(self.learned, trained, optimizer, losses)
        return losses

    def close(self) -> None:
        self.layers.close()
        self.model.train(self.was_training)
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def _endless(self, batches: Batches) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from batches.epoch(generator)

    def _tokens(self, batch: Batch, done: int):
        """Every row with the adapters that are not dropped in this step, and the empty ones.

        Its prompt is what comes before the labels.
        """
        rng = random.Random(f"{self.seed}/{done}")
        rows, length = batch["input_ids"].shape
        kept = []
        for _ in range(rows):
            draws = [(rng.random() < self.dropout, rng.random(), slot) for slot in range(self.count)]
            stay = sum(not dropped for dropped, _, _ in draws)
            chosen = sorted(draws)[: max(stay, min(_SURVIVORS, self.count))]
            kept.append([*sorted(slot for _, _, slot in chosen), *[self.count] * self.empty])
        answered = batch["labels"] != IGNORED
        prompts = answered.int().argmax(1).clamp(min=1).tolist()
        width = self.count + self.empty
        return tokens_of(kept, [length] * rows, width=width, slots=self.slots, pooled=prompts, device=self.model.device)


def _share_of_rate(done: int, steps: int, warmup: int) -> float:
    if done < warmup:
        return (done + 1) / warmup
    return (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup))) / 2


def _digest(adapter: Mapping[str, LoraFactors]) -> str:
    """Of all its factors."""
    return digest_of((f"{module}.{name}", getattr(f, name)) for module, f in adapter.items() for name in ("A", "B"))
