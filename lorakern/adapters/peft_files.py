"""The two files of a PEFT adapter, read with every check and written so that a crash leaves no mixture."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from lorakern.adapters.factors import LoraFactors, check_name, check_shapes
from lorakern.adapters.json_file import show
from lorakern.adapters.peft_config import CONFIG_NAME, AdapterConfig, read_config
from lorakern.adapters.peft_refusals import PREFIX, split_key
from lorakern.adapters.safetensors_header import TensorInfo, read_header
from lorakern.errors import LorakernError

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE = "it can run code when loaded, so load it in PEFT where you trust it and call save_pretrained"


def read_adapter(path: Path, check_finite: bool) -> tuple[dict[str, LoraFactors], AdapterConfig]:
    """See `LoraAdapter.load`."""
    try:
        weights, config_file = _find_files(path)
        config = read_config(config_file)
        pairs = _pair_up(read_header(weights), weights)
        scales = _scales(pairs, config, config_file)
        with safe_open(weights, framework="pt") as tensors:
            factors = {
                module: LoraFactors(_aligned(tensors, a), _aligned(tensors, b), scales[module])
                for module, (a, b, _) in pairs.items()
            }
    except (OSError, SafetensorError) as error:
        raise LorakernError(f"{path}: the adapter cannot be read ({error}); check the file and its rights") from error
    if check_finite:
        _check_finite(factors, weights)
    return factors, config


def write_adapter(path: Path, factors: Mapping[str, LoraFactors], config: AdapterConfig) -> None:
    """See `LoraAdapter.save`."""
    if path.exists() and not path.is_dir():
        raise LorakernError(f"{path}: this is a file; an adapter is saved to a directory, give one")
    # clones, as safetensors takes no tensors that share memory
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for module, (A, B, _) in factors.items()
        for letter, tensor in (("A", A), ("B", B))
    }
    contents = {
        WEIGHTS_NAME: to_safetensors(tensors, metadata={"format": "pt"}),
        CONFIG_NAME: json.dumps(config.to_json(), indent=2).encode(),
    }
    try:
        _replace_files(path, contents)
    except OSError as error:
        raise LorakernError(f"{path}: the adapter cannot be saved ({error}); give a directory to write to") from error


def _find_files(path: Path) -> tuple[Path, Path]:
    """The weights and the config; raises `LorakernError` that says what is there instead."""
    if not path.exists():
        raise LorakernError(f"{path}: no such file or directory; download an adapter of the Hugging Face hub first")
    folder, weights = (path, path / WEIGHTS_NAME) if path.is_dir() else (path.parent, path)
    config = folder / CONFIG_NAME
    if not path.is_dir() and path.suffix != ".safetensors":
        raise LorakernError(
            f"{path}: not opened, only a directory or a .safetensors file is; a pickle file (.bin, .pt): {_PICKLE}"
        )
    if not config.is_file():
        names = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"did you mean {' or '.join(names[:8])}?" if names else "give the directory that PEFT saved to"
        raise LorakernError(f"{folder}: there is no {CONFIG_NAME} in it; {hint}")
    if not weights.is_file():
        pickles = sorted(file for file in folder.glob("adapter_model.*") if file.suffix in (".bin", ".pt", ".pth"))
        hint = f"{pickles[0].name} is not opened: {_PICKLE}" if pickles else "save or download the adapter again"
        raise LorakernError(f"{folder}: there is no {WEIGHTS_NAME} in it; {hint}")
    return weights, config


def _pair_up(header: Mapping[str, TensorInfo], file: Path) -> dict[str, tuple[str, str, int]]:
    """Module path to (key of A, key of B, rank), in file order."""
    modules: dict[str, dict[str, str]] = {}
    for key in header:
        module, letter = split_key(key, file)
        check_name(module, f"{file}: ")
        modules.setdefault(module, {})[letter] = key
    if not modules:
        raise LorakernError(f"{file}: the file holds no tensors; save the adapter again")
    pairs = {}
    for module, keys in modules.items():
        if len(keys) != 2:
            there, missing = ("A", "B") if "A" in keys else ("B", "A")
            raise LorakernError(
                f"{file}: {module} has lora_{there} but no lora_{missing}; the file is incomplete, save it again"
            )
        a, b = keys["A"], keys["B"]
        check_shapes(f"{file}: {module}", header[a].shape, header[b].shape)
        pairs[module] = (a, b, header[a].shape[0])
    return pairs


def _scales(pairs: Mapping[str, tuple[str, str, int]], config: AdapterConfig, file: Path) -> dict[str, float]:
    """Module path to scale; raises where config and tensors disagree, as PEFT would refuse or drop the tensors."""
    ranks = {module: rank for module, (_, _, rank) in pairs.items()}
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


def _aligned(tensors: Any, key: str) -> torch.Tensor:
    """A view of the mapped file, or a copy where the file places the tensor across its dtype's alignment."""
    tensor = tensors.get_tensor(key)
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _check_finite(factors: Mapping[str, LoraFactors], file: Path) -> None:
    for module, (A, B, _) in factors.items():
        for letter, tensor in (("A", A), ("B", B)):
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise LorakernError(
                    f"{file}: lora_{letter} of {module} has {bad} values that are NaN or infinite; the training went "
                    "wrong, or load with check_finite=False"
                )


def _replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files under temporary names, sync them, and rename them in order; the last one is away meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{secrets.token_hex(4)}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            with temporary[name].open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        (folder / list(contents)[-1]).unlink(missing_ok=True)
        for name in contents:
            _sync(folder)  # each step is on the disk before the next one
            temporary[name].replace(folder / name)
        _sync(folder)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
