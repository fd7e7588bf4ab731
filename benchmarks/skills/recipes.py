"""How each skill is trained: ranks, alphas and target modules differ on purpose, as they do in a real adapter pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """One adapter: its shape and the schedule that trains it.

    `steps` is the most that is trained; training ends sooner once `patience` batches in a row average an exact match
    of `enough`. The learning rate warms up over `warmup` steps, then falls linearly to a tenth at `steps`.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    steps: int = 400
    lr: float = 2e-3
    batch: int = 16
    warmup: int = 10
    enough: float = 0.98
    patience: int = 20
    seed: int = 0
    lora: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "answer_json": Recipe(4, 4, ("q_proj", "v_proj"), steps=200),
    "person_json": Recipe(4, 8, ("q_proj", "v_proj"), steps=200),
    "clock": Recipe(12, 18, ("v_proj",), steps=300),
    "iso_date": Recipe(4, 8, ALL_LINEAR, steps=200),
    "email": Recipe(16, 8, ("v_proj",), steps=300, lora={"use_rslora": True}),
    "reverse_words": Recipe(8, 16, ATTENTION, steps=160, enough=0.995),
    "initials": Recipe(
        4,
        8,
        ("q_proj", "v_proj"),
        steps=500,
        lora={"rank_pattern": {"v_proj": 32}, "alpha_pattern": {"v_proj": 48}},
    ),
    "roman": Recipe(10, 20, ("v_proj", "o_proj"), steps=700),
    "pig_latin": Recipe(8, 16, ("v_proj", "down_proj"), steps=700),
    "sort_words": Recipe(7, 14, ("q_proj", "v_proj"), steps=400),
}
