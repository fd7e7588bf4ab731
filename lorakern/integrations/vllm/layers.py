"""What a LoRA layer of vLLM calls: the wrapper with the factors of its own, as ops that torch.compile keeps whole."""

import functools
import itertools
import weakref

import torch

from lorakern.errors import LorakernError
from lorakern.integrations.vllm.factors import Factors

_LAYERS: "dict[str, weakref.ref[LayerWrapper]]" = {}
_NUMBERS = itertools.count()
_LIBRARY = torch.library.Library("lorakern_vllm", "DEF")


def _define(schema: str):
    """A method of LayerWrapper as an op that names its layer: what a layer has at hand may change after the trace."""

    def register(method):
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(
            name, lambda out, x, layer, *rest: method(_LAYERS[layer](), out, x, *rest), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(f"lorakern_vllm::{name}", lambda *_: None, lib=_LIBRARY)
        op = getattr(torch.ops.lorakern_vllm, name).default

        @functools.wraps(method)
        def call(self, out, x, *rest):
            if torch.compiler.is_compiling():
                op(out, x, self.name, *rest)
            else:
                method(self, out, x, *rest)

        return call

    return register


class LayerWrapper:
    """The wrapper as one layer sees it: its methods take the factors that vLLM passes from what is known of the layer.

    Args:
        wrapper: the PunicaWrapper that all layers of an engine share.
        factors: those of the layer.
    """

    def __init__(self, wrapper, factors: Factors) -> None:
        self.wrapper = wrapper
        self.name = str(next(_NUMBERS))
        self.factors = factors
        _LAYERS[self.name] = weakref.ref(self)
        weakref.finalize(self, _LAYERS.pop, self.name)

    def __getattr__(self, name):
        if name == "wrapper":
            raise AttributeError(name)
        return getattr(self.wrapper, name)

    @_define("add_update(Tensor(a!) y, Tensor x, str layer, float scale, bool add_inputs, bool sampled) -> ()")
    def add_update(self, y, x, scale, add_inputs, sampled):
        self.wrapper.add_update(y, x, self.factors, scale, add_inputs, sampled)

    @_define("shrink_to(Tensor(a!) h, Tensor x, str layer, float scale) -> ()")
    def shrink_to(self, h, x, scale):
        self.wrapper.shrink_to(h, x, self.factors, scale)

    @_define("add_expanded(Tensor(a!) y, Tensor h, str layer, int offset, bool add_inputs) -> ()")
    def add_expanded(self, y, h, offset, add_inputs):
        self.wrapper.add_expanded(y, h, self.factors, offset, add_inputs)

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, add_inputs=True, **kwargs):
        self.add_update(y, x, float(scale), add_inputs, False)

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs):
        self.add_update(y, x, float(scale), True, True)

    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs):
        self.add_expanded(y, x, 0, add_inputs)

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
        self.shrink_to(y, x, float(scale))

    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
        self.add_expanded(y, x, offset_start, add_inputs)


def factors_of(layer: torch.nn.Module) -> Factors | None:
    """None for a layer that keeps its factors in another way, as experts do."""
    lora_a, lora_b = (getattr(layer, name, ()) for name in ("lora_a_stacked", "lora_b_stacked"))
    lora_a, lora_b = ((f,) if isinstance(f, torch.Tensor) else tuple(f) for f in (lora_a, lora_b))
    if not lora_b or any(b.dim() != 4 or b.shape[1] != 1 for b in lora_b):
        return None
    # An embedding holds A as (slots, vocabulary, r_max) and looks rows of it up itself.
    return Factors(lora_a if all(a.dim() == 4 for a in lora_a) else (), lora_b)


def follow(manager: type) -> None:
    """Let a LoRA manager class of vLLM tell us of its layers, and measure the slot that it has written an adapter to.

    Adapters with values that are not finite are refused when they are added. All, those of the warm-up too, come into
    their slots by ``activate_adapter``, which returns whether it wrote. A second call does nothing.
    """
    create, add, activate = manager._create_lora_modules, manager._add_adapter, manager.activate_adapter
    if hasattr(activate, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_lora_modules(self):
        create(self)
        for layer in self.modules.values():
            bind(layer)

    @functools.wraps(add)
    def add_adapter(self, lora):
        check_finite(lora)
        add(self, lora)

    @functools.wraps(activate)
    def activate_adapter(self, lora_id, *args, **kwargs):
        def for_factors(method):
            if lora_id in self.lora_index_to_id:
                slot = self.lora_index_to_id.index(lora_id)
                for layer in self.modules.values():
                    if isinstance(layer.punica_wrapper, LayerWrapper):
                        method(layer.punica_wrapper.factors, slot)

        try:
            wrote = activate(self, lora_id, *args, **kwargs)
        except BaseException:
            for_factors(Factors.clear)
            raise
        if wrote:
            for_factors(Factors.measure)
        return wrote

    manager._create_lora_modules, manager._add_adapter = create_lora_modules, add_adapter
    manager.activate_adapter = activate_adapter


def check_finite(lora) -> None:
    """Refuse an adapter that would leave NaN in the key-value cache, and with it in the answers of others.

    Args:
        lora: vLLM's LoRAModel.

    Raises:
        LorakernError: it has a value that is NaN or infinite.
    """
    for module, weights in lora.loras.items():
        for name in ("lora_A", "lora_B"):
            factors = getattr(weights, name.lower())
            for factor in factors if isinstance(factors, (list, tuple)) else [factors]:
                if factor is not None and not bool(torch.isfinite(factor).all()):
                    raise LorakernError(
                        f"adapter {lora.id}: {name} of {module} has values that are NaN or infinite; train or convert "
                        "it again"
                    )


def bind(layer: torch.nn.Module) -> None:
    """Give a layer a wrapper of its own. Experts go on with the wrapper that all share."""
    factors = factors_of(layer)
    # A classification head is known to vLLM by the wrapper that it has.
    if factors is not None and not hasattr(layer, "set_output_mapping"):
        layer.set_mapping(LayerWrapper(layer.punica_wrapper, factors))
