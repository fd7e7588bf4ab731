"""Random LoRA problems with their exact answers, shared by the tests of all backends."""

from dataclasses import dataclass, replace

import torch

import lorakern as lk

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [  # tokens, choices, slots, d_in, d_outs, r_max
    (1, 1, 1, 64, (64,), 16),
    (5, 1, 3, 63, (5,), 1),
    (63, 1, 9, 1000, (100, 37, 64), 24),
    (64, 2, 64, 576, (192,), 5),
    (200, 4, 6, 576, (576, 192), 33),
    (70, 1, 2, 4096, (300,), 96),
    (33, 3, 4, 129, (65, 1), 256),
]
POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed")


def error_ratio(result, exact):
    """RMS of the difference over RMS of the exact values."""
    difference, exact = result.double() - exact.double(), exact.double()
    return (difference.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt().clamp_min(1e-300)).item()


def route(popularity, shape, slots, generator):
    """Slots of the tokens, as popular as in real traffic of that kind."""
    if popularity == "identical":
        return torch.zeros(shape, dtype=torch.long)
    if popularity == "distinct":
        return (torch.arange(shape[0] * shape[1]) % slots).reshape(shape)
    weights = {
        "uniform": torch.ones(slots),
        "zipf": 1 / torch.arange(1, slots + 1),
        "skewed": torch.tensor([float(slots)] + [1 / slots] * (slots - 1)),
    }[popularity]
    return torch.multinomial(weights, shape[0] * shape[1], True, generator=generator).reshape(shape)


@dataclass
class Problem:
    """Arguments of one call. Weights hold NaN beyond the rank of their slot."""

    y: torch.Tensor
    x: torch.Tensor
    A: list
    B: list
    indices: torch.Tensor
    scale: torch.Tensor | None
    ranks: torch.Tensor | None
    gates: torch.Tensor | None
    y_offset: int = 3

    @property
    def options(self):
        return {"scale": self.scale, "ranks": self.ranks, "gates": self.gates}

    def bgmv(self, **options):
        """What lorakern makes of it, in a copy of y."""
        y = self.y.clone()
        options = {"y_offset": self.y_offset, **self.options, **options}
        return lk.bgmv(y, self.x, self.A, self.B, self.indices, **options)

    def double(self):
        def wide(tensor):
            return None if tensor is None else tensor.double()

        return replace(
            self,
            y=wide(self.y),
            x=wide(self.x),
            A=[wide(a) for a in self.A],
            B=[wide(b) for b in self.B],
            scale=wide(self.scale),
            gates=wide(self.gates),
        )

    def exact(self, **options):
        """The reference's answer in float64."""
        with lk.use_backend("reference"):
            return self.double().bgmv(**options)

    def rows(self, start, stop):
        """The same problem for some of its tokens."""
        gates = None if self.gates is None else self.gates[start:stop]
        return replace(self, y=self.y[start:stop], x=self.x[start:stop], indices=self.indices[start:stop], gates=gates)

    def to(self, device):
        """The same problem on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, A=[a.to(device) for a in self.A], B=[b.to(device) for b in self.B], **moved)

    def without_nan(self):
        return replace(self, A=[a.nan_to_num(0.0) for a in self.A], B=[b.nan_to_num(0.0) for b in self.B])

    def served(self):
        """(T,) bool: tokens with an adapter whose rank is not 0."""
        used = self.indices >= 0
        if self.ranks is not None:
            used &= self.ranks[self.indices.clamp_min(0)] > 0
        return used.any(dim=1)


def problem(
    dtype=torch.float32,
    tokens=7,
    choices=1,
    slots=5,
    d_in=40,
    d_outs=(24,),
    r_max=8,
    popularity="uniform",
    options=True,
    absent=0.2,
    seed=0,
    device="cpu",
):
    """A problem with mixed ranks (0 and r_max among them) and NaN beyond them, some tokens without an adapter."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    A = [(randn(slots, r_max, d_in) / d_in**0.5).to(dtype) for _ in d_outs]
    B = [(randn(slots, d_out, r_max) / r_max**0.5).to(dtype) for d_out in d_outs]
    ranks = scale = gates = None
    if options:
        ranks = torch.randint(0, r_max + 1, (slots,), generator=g)
        ranks[-1], ranks[0] = 0, r_max
        for slot, rank in enumerate(ranks.tolist()):
            for a, b in zip(A, B, strict=True):
                a[slot, rank:] = float("nan")
                b[slot, :, rank:] = float("nan")
        scale = torch.rand(slots, generator=g) + 0.5
        gates = torch.rand(tokens, choices, generator=g)
    indices = route(popularity, (tokens, choices), slots, g)
    indices[torch.rand(tokens, choices, generator=g) < absent] = -1
    whole = Problem(
        y=randn(tokens, sum(d_outs) + 7).to(dtype),
        x=randn(tokens, d_in).to(dtype),
        A=A,
        B=B,
        indices=indices,
        scale=scale,
        ranks=ranks,
        gates=gates,
    )
    return whole if device == "cpu" else whole.to(device)
