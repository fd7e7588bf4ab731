"""The sweeps of IterIS: passes over the samples, and the solution of all layers after each."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from lorakern.adapters.factors import checked
from lorakern.adapters.json_file import show
from lorakern.adapters.state_file import digest_of
from lorakern.errors import LorakernError
from lorakern.merge.inputs import Factors
from lorakern.merge.iteris.equations import Equations, energies
from lorakern.merge.iteris.features import Features, Group
from lorakern.merge.iteris.layers import Layer
from lorakern.merge.iteris.samples import Samples
from lorakern.merge.iteris.state import State

Progress = Callable[[int, int, str], None]


class Options(NamedTuple):
    """What is solved; `lorakern.merge.iteris.solve` says what they mean."""

    alpha: float
    lambda_source: str | None
    target: str
    ratio: float
    coefficients: tuple[float, ...]


class Sweeps:
    """Goes from a `State` to one of more sweeps."""

    def __init__(
        self,
        op: str,
        model: torch.nn.Module,
        adapters: Mapping[str, Factors],
        layers: list[Layer],
        samples: list[Samples],
        options: Options,
        max_memory: int | None,
        progress: Progress | None,
    ) -> None:
        self._op = op
        self._model = model
        self._adapters = adapters
        self._layers = layers
        self._samples = samples
        self._options = options
        self._full = options.target == "full"
        self._max_memory = max_memory
        self._progress = progress
        self._features = Features(op, model, adapters, layers)

    def run(self, state: State, iterations: int, save: Callable[[State], None] | None) -> State:
        """The state after so many sweeps and the objective of the last; `save` is called after each of them."""
        if state.sweeps == iterations == len(state.objectives):
            return state
        with self._features.running():
            parts = self._begin(iterations - state.sweeps + 1)
            while state.sweeps < iterations:
                state = self._sweep(state, parts, solving=True)
                if save is not None:
                    save(state)
            state = self._sweep(state, parts, solving=False)
            if save is not None:
                save(state)
        return state

    def objective(self, merged: Mapping[str, Any]) -> dict[str, float]:
        """By module, of updates that are dense or (A, B, scale)."""
        state = State(1, self._dense(merged))
        with self._features.running():
            parts = self._begin(2)
            for _ in self._equations(parts, None, state, "lambdas"):
                # all that is wanted of the task models' features are lambda and the energies in `state`
                pass
            return self._sweep(state, parts, solving=False).objectives[0]

    def arguments(self) -> dict[str, Any]:
        """What the result of a sweep depends on, short enough to compare."""
        adapters = (
            ((f"{module} {f.scale}", tensor) for module, f in adapter.items() for tensor in (f.A, f.B))
            for adapter in self._adapters.values()
        )
        return self._options._asdict() | {
            "model": digest_of(self._model.state_dict().items()),
            "adapters": [digest_of(tensors) for tensors in adapters],
            "samples": [samples.digest() for samples in self._samples],
        }

    @property
    def transposed(self) -> bool:
        """Whether the layers store their weights as (d_in, d_out)."""
        return any(layer.transposed for layer in self._layers)

    def _dense(self, merged: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if not isinstance(merged, Mapping):
            raise LorakernError(
                f"{self._op}: merged must be a LoraAdapter or a mapping of module to update; got {show(merged)}"
            )
        shapes = {layer.name: tuple(layer.weight.shape) for layer in self._layers}
        updates = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name, update in merged.items():
            if not isinstance(update, torch.Tensor):
                A, B, scale = checked(name, update)
                update = scale * B.detach().float() @ A.detach().float()
            if shapes.get(name) != tuple(update.shape):
                takes = f"has the shape {shapes[name]}" if name in shapes else "is targeted by no adapter"
                raise LorakernError(
                    f"{self._op}: merged holds {tuple(update.shape)} for module {name!r}, which {takes}; give a "
                    "merge of these adapters, by the names of the model"
                )
            updates[name] = update
        return updates

    def _begin(self, passes: int) -> list[list[Group]]:
        """The layers in parts; `passes` over all samples are to come, of each part."""
        parts = self._parts(self._features.groups(next(iter(self._samples[0]))))
        self._passes = passes * len(parts) * len(self._samples)
        self._ticks = iter(range(self._passes))
        return parts

    def _parts(self, groups: list[Group]) -> list[list[Group]]:
        """The groups in parts whose sums fit into `max_memory`, in their order."""
        parts, left = [], 0
        for group in groups:
            size = self._bytes(group)
            if self._max_memory is not None and size > self._max_memory:
                raise LorakernError(
                    f"{self._op}: max_memory = {self._max_memory} is too little for {group[0].name!r}, whose sums, "
                    f"with those of {len(group) - 1} layers of the same input, need {size} bytes; give at least that"
                )
            if not parts or (self._max_memory is not None and size > left):
                parts.append([])
                left = self._max_memory or 0
            parts[-1].append(group)
            left -= size
        return parts

    def _bytes(self, group: Group) -> int:
        """Of a group: C and G once, D (and C of full weights) and the A_i C_i of every layer, all float64.

        And the float32 rows of X and X~ that wait for their product, d_in / 2 of them.
        """
        d_in = group[0].d_in
        ranks = sum(factors.rank for layer in group for factors in layer.factors if factors is not None)
        return 4 * d_in**2 + 8 * d_in * ((2 + len(group) * (2 if self._full else 1)) * d_in + ranks)

    def _sweep(self, state: State, parts: list[list[Group]], solving: bool) -> State:
        """One pass: the objective of the merged model and, if solving, the next updates in place of the old ones."""
        merged = None
        if state.sweeps:
            merged = {f"{layer.name}.weight": layer.folded(state.updates[layer.name]) for layer in self._layers}
        what = f"sweep {state.sweeps + 1}" if solving else "objective"
        new = State(state.sweeps + solving, {}, dict(state.lambdas), dict(state.energies), list(state.objectives))
        objectives = {}
        for layer, equations in self._equations(parts, merged, new, what):
            if merged is not None:
                # the old update goes as the new one comes: beside the merged weights there is one set of updates
                update = state.updates.pop(layer.name) if solving else state.updates[layer.name]
                value = equations.objective(update, new.energies[layer.name])
                if not math.isfinite(value):
                    raise LorakernError(
                        f"{self._op}: the objective of module {layer.name!r} after sweep {state.sweeps} is {value}; "
                        "give a larger alpha"
                    )
                objectives[layer.name] = value
            if solving:
                self._solve(layer, equations, new)
        # known already where more sweeps were asked for later
        if merged is not None and len(new.objectives) < state.sweeps:
            new.objectives.append(objectives)
        if not solving:
            new.updates, new.undetermined = state.updates, state.undetermined
        return new

    def _equations(
        self, parts: list[list[Group]], merged: Mapping[str, torch.Tensor] | None, state: State, what: str
    ) -> Iterator[tuple[Layer, Equations]]:
        """The equations of all layers, part by part, with what the first sweep alone knows put into `state`."""
        for groups in parts:
            sums = {layer: Equations(layer, self._full) for group in groups for layer in group}
            for i, samples in enumerate(self._samples):
                if self._progress is not None:
                    names = f"{groups[0][0].name} to {groups[-1][-1].name}"
                    self._progress(next(self._ticks), self._passes, f"{what}, {names}, adapter {i}")
                products = self._features.products(i, samples, groups, merged, self._options.ratio)
                for group, (C, G) in zip(groups, products, strict=True):
                    for layer in group:
                        if merged is None:
                            self._measure(layer, i, G, state)
                        weight = self._options.coefficients[i] * state.lambdas[layer.name][i]
                        sums[layer].add(i, weight, self._options.alpha, C, G)
                del products
            for layer in list(sums):
                yield layer, sums.pop(layer)

    def _measure(self, layer: Layer, i: int, G: torch.Tensor, state: State) -> None:
        """lambda_i, and the energy of what the objective is to reproduce."""
        source = self._options.lambda_source
        target = energies(layer, i, G, self._full, torch.float64)
        state.energies.setdefault(layer.name, []).append(target.output)
        value = 1.0
        if source is not None:
            own = target
            if self._full != (source == "full"):
                # only a weight: as precise as the products in G
                own = energies(layer, i, G, source == "full", torch.promote_types(layer.weight.dtype, torch.float32))
            if not own.output > 0:
                raise LorakernError(
                    f"{self._op}: module {layer.name!r}: the {source} weight of adapter {i} gives zero on its samples, "
                    f"so lambda_source={source!r} has no lambda; use lambda_source="
                    + ("'full' or None" if source == "delta" else "None")
                )
            value = own.weight / own.output
        state.lambdas.setdefault(layer.name, []).append(value)

    def _solve(self, layer: Layer, equations: Equations, state: State) -> None:
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        update, undetermined = equations.solve(torch.finfo(wide).eps)
        update = update.float().cpu()
        if not bool(torch.isfinite(update).all()):
            raise LorakernError(
                f"{self._op}: the update of module {layer.name!r} in sweep {state.sweeps} is not finite; give a "
                "larger alpha"
            )
        state.updates[layer.name] = update.contiguous()
        if undetermined:
            state.undetermined[layer.name] = undetermined
