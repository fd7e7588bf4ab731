"""adapter_config.json: what of it changes the math, and what cannot be a plain delta and is refused."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorakern.adapters.json_file import parse_object, show
from lorakern.adapters.patterns import exact_key, resolve
from lorakern.adapters.peft_refusals import check_fields
from lorakern.errors import LorakernError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
TASK_TYPES = (
    None,
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a PEFT LoRA config that lorakern acts on; `rest` keeps every other one as it was read."""

    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: int | float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "rest"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self):  # a MappingProxyType can be neither pickled nor deep-copied
        plain = (dict(v) if isinstance(v, MappingProxyType) else v for v in vars(self).values())
        return type(self), tuple(plain)

    def to_json(self) -> dict[str, Any]:
        """The fields of the file. The order inside a pattern is kept: the first hit wins, so it is part of the math."""
        plain = {name: dict(v) if isinstance(v, MappingProxyType) else v for name, v in vars(self).items()}
        return dict(sorted({**plain.pop("rest"), **plain}.items()))

    def ranks(self, modules: Collection[str], file: Path | str) -> dict[str, int]:
        """Module path to the rank that the config gives it."""
        return resolve(self.rank_pattern, modules, self.r, "rank_pattern", file)

    def scales(self, ranks: Mapping[str, int], file: Path | str) -> dict[str, float]:
        """Module path to alpha / r, or alpha / sqrt(r) under use_rslora; r is the module's own rank."""
        alphas = resolve(self.alpha_pattern, ranks, self.lora_alpha, "alpha_pattern", file)
        return {name: alphas[name] / _divisor(rank, self.use_rslora) for name, rank in ranks.items()}

    def untargeted(self, modules: Iterable[str]) -> str | None:
        """The first module that a list of target_modules leaves out: PEFT would drop its weights without a word."""
        if not isinstance(self.target_modules, tuple):
            return None  # a regular expression, or nothing said
        targets = set(self.target_modules)
        for module in modules:
            parts = module.split(".")
            if not any(".".join(parts[i:]) in targets for i in range(len(parts))):
                return module
        return None


def _divisor(rank: int, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else rank


def parse_config(text: bytes, file: Path) -> AdapterConfig:
    """The config in `text`, that of `file`; raises `LorakernError` for one that is malformed or is no plain delta."""
    if len(text) > MAX_CONFIG_BYTES:
        raise LorakernError(
            f"{file}: the config has more than the {MAX_CONFIG_BYTES} bytes that an adapter may need; "
            "this is no PEFT config"
        )
    return config_of(parse_object(text, file, "the config"), file)


def config_of(fields: Mapping[str, Any], file: Path) -> AdapterConfig:
    """The config with these fields; see `parse_config`."""
    fields = dict(fields)
    check_fields(fields, file)

    def take(name: str, kinds: tuple[type, ...], default: Any, says: str) -> Any:
        value = fields.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise LorakernError(f"{file}: {name} must be {says}, got {show(value)}; correct it in the file")
        return value

    def number(value: Any, name: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise LorakernError(f"{file}: {name} must be a finite number, got {show(value)}; correct it in the file")
        return value

    def rank(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LorakernError(f"{file}: {name} must be a positive integer, got {show(value)}; correct it in the file")
        return value

    targets = take("target_modules", (str, list), None, "a list of strings, a string or null")
    if isinstance(targets, list) and not all(isinstance(target, str) for target in targets):
        raise LorakernError(f"{file}: target_modules must hold strings, got {show(targets)}; correct it in the file")
    ranks = take("rank_pattern", (dict,), {}, "an object of pattern: rank")
    alphas = take("alpha_pattern", (dict,), {}, "an object of pattern: alpha")
    return AdapterConfig(
        base_model_name_or_path=take("base_model_name_or_path", (str,), None, "a string or null"),
        r=rank(fields.pop("r", 8), "r"),  # PEFT's defaults, for a config that leaves them out
        lora_alpha=number(fields.pop("lora_alpha", 8), "lora_alpha"),
        use_rslora=take("use_rslora", (bool,), False, "true or false"),
        rank_pattern={key: rank(value, f"rank_pattern[{show(key)}]") for key, value in ranks.items()},
        alpha_pattern={key: number(value, f"alpha_pattern[{show(key)}]") for key, value in alphas.items()},
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
        fan_in_fan_out=take("fan_in_fan_out", (bool,), False, "true or false"),
        task_type=take("task_type", (str,), None, "a string or null"),
        rest=fields,
    )


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def make_config(
    ranks_scales: Mapping[str, tuple[int, float]],
    base_model_name_or_path: str | None,
    fan_in_fan_out: bool,
    use_rslora: bool,
    task_type: str | None,
) -> AdapterConfig:
    """The config from which PEFT gives every module its rank and scale, the most common ones as r and lora_alpha."""
    if not isinstance(base_model_name_or_path, str | None):
        raise LorakernError(f"base_model_name_or_path must be a string or None, got {show(base_model_name_or_path)}")
    if task_type not in TASK_TYPES:
        raise LorakernError(f"task_type must be one of {TASK_TYPES}, got {show(task_type)}")
    ranks = {name: rank for name, (rank, _) in ranks_scales.items()}
    alphas = {name: _alpha(scale, _divisor(rank, use_rslora)) for name, (rank, scale) in ranks_scales.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    return AdapterConfig(
        base_model_name_or_path=base_model_name_or_path,
        fan_in_fan_out=bool(fan_in_fan_out),
        use_rslora=bool(use_rslora),
        task_type=task_type,
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern={exact_key(name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={exact_key(name): alpha for name, alpha in alphas.items() if alpha != lora_alpha},
        target_modules=tuple(ranks),
        rest={
            "peft_type": "LORA",
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "use_dora": False,
        },
    )


def _alpha(scale: float, divisor: float) -> int | float:
    """alpha with alpha / divisor == scale, or one unit in the last place away where float64 has no such alpha."""
    alpha = scale * divisor
    whole = round(alpha)  # (1 / 49) * 49 is just below 1
    return whole if abs(whole) < 2**53 and whole / divisor == scale else alpha
