"""The two files of a PEFT adapter: where they are, which tensors make a module, and the scale of each."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lorakern.adapters.factors import check_name, check_shapes
from lorakern.adapters.json_file import show
from lorakern.adapters.peft_config import CONFIG_NAME, AdapterConfig
from lorakern.adapters.peft_refusals import split_key
from lorakern.adapters.safetensors_header import TensorInfo
from lorakern.errors import LorakernError

WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
_PICKLE = "it can run code when loaded, so load it in PEFT where you trust it and call save_pretrained"


class Pair(NamedTuple):
    """The names of a module's two tensors, and their rank."""

    A: str
    B: str
    rank: int


def find_files(path: Path) -> tuple[Path, Path | None]:
    """The weights, and the config or None for a single file; raises `LorakernError` that says what is there instead."""
    if not path.exists():
        raise LorakernError(f"{path}: no such file or directory; download an adapter of the Hugging Face hub first")
    if not path.is_dir():
        if path.suffix != ".safetensors" or not path.is_file():
            raise LorakernError(
                f"{path}: not opened, only a directory or a .safetensors file is; a pickle file (.bin, .pt): {_PICKLE}"
            )
        config = path.parent / CONFIG_NAME
        return path, config if config.is_file() else None
    weights, config = path / WEIGHTS_NAME, path / CONFIG_NAME
    if not config.is_file():
        names = [str(file.parent) for file in path.glob(f"*/{CONFIG_NAME}")]
        names += [str(file) for file in path.glob("*.safetensors") if file != weights]
        hint = f"did you mean {' or '.join(sorted(names)[:8])}?" if names else "give the directory that PEFT saved to"
        raise LorakernError(f"{path}: there is no {CONFIG_NAME} in it; {hint}")
    if not weights.is_file():
        pickles = sorted(file for file in path.glob("adapter_model.*") if file.suffix in (".bin", ".pt", ".pth"))
        hint = f"{pickles[0].name} is not opened: {_PICKLE}" if pickles else "save or download the adapter again"
        raise LorakernError(f"{path}: there is no {WEIGHTS_NAME} in it; {hint}")
    return weights, config


def pair_up(keys: Iterable[tuple[str, str, str]], tensors: Mapping[str, TensorInfo], file: Path) -> dict[str, Pair]:
    """Module path to its `Pair`, in file order, from (module path, "A" or "B", tensor name)."""
    modules: dict[str, dict[str, str]] = {}
    for module, letter, key in keys:
        check_name(module, f"{file}: ")
        if other := modules.setdefault(module, {}).get(letter):
            raise LorakernError(
                f"{file}: {module} has lora_{letter} twice, as {show(other)} and {show(key)}; remove one of them"
            )
        modules[module][letter] = key
    if not modules:
        raise LorakernError(f"{file}: the file holds no tensors; save the adapter again")
    pairs = {}
    for module, letters in modules.items():
        if len(letters) != 2:
            there, missing = ("A", "B") if "A" in letters else ("B", "A")
            raise LorakernError(
                f"{file}: {module} has lora_{there} but no lora_{missing}; the file is incomplete, save it again"
            )
        a, b = letters["A"], letters["B"]
        check_shapes(f"{file}: {module}", tensors[a].shape, tensors[b].shape)
        pairs[module] = Pair(a, b, tensors[a].shape[0])
    return pairs


def peft_pairs(tensors: Mapping[str, TensorInfo], file: Path) -> dict[str, Pair]:
    """Module path to its `Pair`, for a file in PEFT's format."""
    return pair_up(((*split_key(key, file), key) for key in tensors), tensors, file)


def peft_scales(ranks: Mapping[str, int], config: AdapterConfig, file: Path) -> dict[str, float]:
    """Module path to scale; raises where config and tensors disagree, as PEFT would refuse or drop the tensors."""
    for module, rank in config.ranks(ranks, file).items():
        if rank != ranks[module]:
            raise LorakernError(
                f"{file}: r and rank_pattern give {module} rank {rank}, its tensors have rank {ranks[module]}; "
                "correct the config, or take the one that was saved with the tensors"
            )
    if (module := config.untargeted(ranks)) is not None:
        raise LorakernError(
            f"{file}: target_modules = {show(list(config.target_modules))} leaves out {module}, for which there are "
            "tensors, and PEFT would not apply them; add the module to the list, or remove the tensors"
        )
    return config.scales(ranks, file)
