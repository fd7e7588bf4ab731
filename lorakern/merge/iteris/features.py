"""Task models and the merged model on the same batches, and the inner products of what goes into their layers."""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch.func import functional_call

from lorakern.errors import LorakernError
from lorakern.integrations.transformers import attach
from lorakern.merge.inputs import Factors
from lorakern.merge.iteris.layers import Layer
from lorakern.merge.iteris.products import Products
from lorakern.merge.iteris.samples import Batch, Samples

# Layers that are given the same tensor share their inner products.
Group = tuple[Layer, ...]


class Features:
    """The models of a merge: task model i is the base model with adapter i, the merged one has other weights.

    Inside `running` the adapters are attached and dropout is off; afterwards the model is what it was, bit for bit.
    """

    def __init__(self, op: str, model: torch.nn.Module, adapters: Mapping[str, Factors], layers: list[Layer]) -> None:
        self._op = op
        self._model = model
        self._adapters = adapters
        self._names = list(adapters)
        self._layers = layers

    @contextmanager
    def running(self) -> Iterator[None]:
        training = {module: module.training for module in self._model.modules()}
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            self._attached = attach(self._model, self._adapters)
            stack.callback(self._attached.detach)
            stack.callback(lambda: [setattr(module, "training", mode) for module, mode in training.items()])
            self._model.eval()
            yield

    def groups(self, batch: Batch) -> list[Group]:
        """The layers, those together that are given the same tensor.

        Raises:
            LorakernError: a layer does not run.
        """
        calls: dict[Layer, list[int]] = {layer: [] for layer in self._layers}
        # by the tensors themselves, not their memory, which may be another's as soon as they are gone
        tensors: list[tuple[weakref.ref, int]] = []

        def take(layer, x):
            # what overwrites an inference tensor cannot be seen: it is shared with none
            version = len(tensors) if x.is_inference() else x._version
            known = (n for n, (tensor, then) in enumerate(tensors) if tensor() is x and then == version)
            number = next(known, len(tensors))
            if number == len(tensors):
                tensors.append((weakref.ref(x), version))
            calls[layer].append(number)

        with self._attached.use(self._names[:1]), _caught(self._layers, take):
            self._model(*batch.args, **batch.named)
        groups: dict[tuple, list[Layer]] = {}
        for layer, keys in calls.items():
            if not keys:
                raise LorakernError(
                    f"{self._op}: module {layer.name!r} does not run when the model is called with the samples, so "
                    "it has no features; leave it out of the adapters"
                )
            groups.setdefault(tuple(keys), []).append(layer)
        self._calls = {layer: len(keys) for layer, keys in calls.items()}
        return [tuple(group) for group in groups.values()]

    def products(
        self, i: int, samples: Samples, groups: Sequence[Group], merged: Mapping[str, torch.Tensor] | None, ratio: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(C, G) of every group, ``X^T X~`` and ``X~^T X~``, (d_in, d_in) in float64: one tensor if X~ is X.

        X, a row per token, is the input in task model i and X~ that in the merged model, whose parameters `merged`
        holds by name; without it, X~ is X. With a ratio, X~ is ``(1 - ratio) X~ + ratio X``.

        Products are those of the features' own precision, float32 at least.
        """
        leads = [group[0] for group in groups]
        calls = sum(self._calls[lead] for lead in leads)
        sums = {lead: Products(lead.d_in, lead.weight.device, same=merged is None) for lead in leads}
        for batch in samples:
            features: dict[Layer, list[torch.Tensor]] = {lead: [] for lead in leads}

            def take(layer, x, batch=batch, features=features):
                rows = self._rows(layer, x, batch.mask)
                if merged is None:
                    sums[layer].add(rows, rows)
                features[layer].append(rows if merged is not None else None)

            def add(layer, x, batch=batch, features=features):
                task, rows = features[layer].pop(0), self._rows(layer, x, batch.mask)
                sums[layer].add(task, torch.lerp(rows, task, ratio) if ratio else rows)

            with self._attached.use([self._names[i]]), _caught(leads, take, calls):
                self._model(*batch.args, **batch.named)
            for lead, caught in features.items():
                if len(caught) != self._calls[lead]:
                    raise LorakernError(
                        f"{self._op}: module {lead.name!r} runs {self._calls[lead]} times in one batch and "
                        f"{len(caught)} times in another, so models cannot be compared; leave it out of the adapters"
                    )
            if merged is not None:
                with _caught(leads, add, calls):
                    functional_call(self._model, merged, batch.args, batch.named, tie_weights=False)
        products = [sums[lead].finish() for lead in leads]
        for lead, parts in zip(leads, products, strict=True):
            # sums of products are finite only if every one of them is
            if not all(math.isfinite(float(part.sum())) for part in parts):
                raise LorakernError(
                    f"{self._op}: the features of module {lead.name!r} under {self._names[i]!r} hold NaN or infinity; "
                    "leave that adapter out, give other samples, or run the model in float32 or bfloat16"
                )
        return products

    def _rows(self, layer: Layer, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The input of a layer, a row for each token that is no padding: a copy, as the model may overwrite its own."""
        rows = x.detach().reshape(-1, layer.d_in)
        if mask is not None:
            if mask.numel() != len(rows):
                raise LorakernError(
                    f"{self._op}: module {layer.name!r} is given {tuple(x.shape)}, where the padding of an "
                    f"attention_mask {tuple(mask.shape)} cannot be told; give batches without padding"
                )
            rows = rows[mask.reshape(-1)]
        return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=mask is None)


class _Enough(BaseException):
    """Ends a forward; no error, so that no model takes it for one."""


@contextmanager
def _caught(
    layers: Sequence[Layer], take: Callable[[Layer, torch.Tensor], None], calls: int | None = None
) -> Iterator[None]:
    """Inside, `take` sees the input of every call of these layers.

    The block ends after so many calls: what the model would compute further, such as its logits, nobody wants.
    """
    seen = itertools.count(1)

    def hook(layer):
        def before(module, inputs, named):
            (x,) = inputs or named.values()
            take(layer, x)
            if next(seen) == calls:
                raise _Enough

        return before

    with suppress(_Enough), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield
