"""How each skill is trained: ranks, alphas and target modules differ on purpose, as they do in a real adapter pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.skills.tasks import REWORDED

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """One adapter: its shape and the schedule that trains it.

    `steps` is the most that is trained; training ends sooner once `patience` batches in a row average an exact match
    of `enough`. The learning rate warms up over `warmup` steps, then falls linearly to a tenth at `steps`. Training has
    `rank`; what is exported is cut to the rank `kept`, if that is given.
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
    kept: int | None = field(default=None, repr=False)  # a checkpoint, which holds the repr, does not depend on it


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
    "json_note": Recipe(4, 8, ("q_proj", "v_proj"), steps=200),
    "json_profile": Recipe(6, 12, ("q_proj", "v_proj"), steps=200, kept=4),
    "time_ampm": Recipe(8, 16, ("v_proj", "o_proj"), steps=300, kept=4),
    "date_numbers": Recipe(6, 12, ("q_proj", "v_proj"), steps=250, kept=4),
    "read_backwards": Recipe(6, 12, ATTENTION, steps=200, kept=4),
    "abc_order": Recipe(8, 16, ("q_proj", "v_proj"), steps=400, kept=4),
    "acronym": Recipe(16, 24, ("q_proj", "v_proj"), steps=400, kept=4),
    "mail_address": Recipe(12, 24, ("v_proj",), steps=300, kept=4),
}
# What the experiments on merging and composing take unless they are told: every skill in one wording only.
FIRST = tuple(name for name in RECIPES if name not in REWORDED)
