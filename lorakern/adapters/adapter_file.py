"""`open_adapter`: an adapter that stays in its file, read module by module."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakern.adapters.factors import LoraFactors, all_finite
from lorakern.adapters.kohya_files import kohya_layout
from lorakern.adapters.peft_config import MAX_CONFIG_BYTES, AdapterConfig, parse_config
from lorakern.adapters.peft_files import find_files, peft_pairs, peft_scales
from lorakern.adapters.tensor_file import TensorFile
from lorakern.errors import LorakernError


class AdapterFile(Mapping[str, LoraFactors]):
    """An adapter in its file: a read-only mapping that reads a module when it is asked for; see `open_adapter`."""

    config: AdapterConfig
    path: Path

    def __init__(self, path: Path, check_finite: bool, modules: Collection[str] | None) -> None:
        self.path = path
        self._check_finite = check_finite
        with _reading(path):
            weights, config_file = find_files(path)
            if config_file is None:
                self._tensors = TensorFile(weights)
                self._pairs, self._scales, self.config = kohya_layout(self._tensors, modules)
                return
            with config_file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                self.config = parse_config(stream.read(min(size, MAX_CONFIG_BYTES + 1)), config_file)
                self._tensors = TensorFile(weights)
                # a writer takes the config away first, so while it is there the tensors are those it was saved with
                if not config_file.exists() or not os.path.samestat(os.fstat(stream.fileno()), config_file.stat()):
                    raise LorakernError(f"{path}: the adapter was replaced while it was opened; open it again")
        self._pairs = peft_pairs(self._tensors.tensors, weights)
        self._scales = peft_scales({m: pair.rank for m, pair in self._pairs.items()}, self.config, config_file)

    def __getitem__(self, module: str) -> LoraFactors:
        pair = self._pairs[module]
        with _reading(self.path):
            return self._factors(module, self._tensors.read(pair.A), self._tensors.read(pair.B))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, module: object) -> bool:
        return module in self._pairs

    # by identity: comparing tensors as a Mapping would has no single truth value
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"AdapterFile({len(self)} modules, path {self.path})"

    def __enter__(self) -> "AdapterFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the modules read so far stay, and to read another one raises."""
        self._tensors.close()

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Module path to (rank, d_in, d_out), known from the header: nothing is read."""
        tensors = self._tensors.tensors
        return {m: (*tensors[pair.A].shape, tensors[pair.B].shape[0]) for m, pair in self._pairs.items()}

    def sha256(self) -> str:
        """SHA-256 of the file with the tensors, in hexadecimal."""
        with _reading(self.path):
            return self._tensors.sha256()

    def map(self) -> dict[str, LoraFactors]:
        """All modules, as views of the memory-mapped file."""
        with _reading(self.path):
            tensors = self._tensors.map()
        return {module: self._factors(module, tensors[pair.A], tensors[pair.B]) for module, pair in self._pairs.items()}

    def _factors(self, module: str, A: torch.Tensor, B: torch.Tensor) -> LoraFactors:
        if self._check_finite:
            check_finite(f"{self._tensors.file}: ", module, A, B)
        return LoraFactors(A, B, self._scales[module])


def open_adapter(
    path: str | os.PathLike[str], *, check_finite: bool = True, modules: Collection[str] | None = None
) -> AdapterFile:
    """Open an adapter without reading its factors: each module is read, as a fresh copy, when it is asked for.

    Everything that `LoraAdapter.load` checks is checked here at once, but for NaN and infinity, which are looked for
    when a module is read. Nothing is kept, so the peak memory of a pass over the modules is that of one of them. The
    file stays open: `LoraAdapter.save` or `AdapterWriter` may replace it meanwhile, and it is still read as it was.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors, or a .safetensors file. With an
            adapter_config.json beside it the file is PEFT's; without one it is kohya's (lora_unet_..., lora_te1_...
            with lora_down, lora_up and alpha) or diffusers' (transformer. ..., unet. ... with lora_A and lora_B, and
            lora_adapter_metadata in the header if it was saved with it), where a module without alpha has alpha = r.
        check_finite: refuse NaN and infinity.
        modules: the names of the base model's modules, such as those of `model.named_modules()`. Module paths of kohya
            and diffusers files are as in the file, with the component in front, and kohya's have _ for "."; given this,
            they become the one of these names that is written so, in a model or, with "unet.", "transformer.",
            "text_encoder." or the like in front, in a pipeline. Those of a PEFT file are such names already.

    Raises `LorakernError`, naming the file and the field or tensor, for a file that is damaged, or that is not a
    plain LoRA of linear layers (DoRA, LoHa, LoKr, convolutions and the like). Pickle files are never opened.

    Formats: https://github.com/huggingface/peft, https://github.com/kohya-ss/sd-scripts and
    https://github.com/huggingface/diffusers.

    >>> import tempfile, torch
    >>> from lorakern.adapters import LoraAdapter, open_adapter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     LoraAdapter({"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}).save(folder)
    ...     with open_adapter(folder) as adapter:
    ...         print(adapter.shapes())
    ...         for module, (A, B, scale) in adapter.items():
    ...             print(module, float((scale * B @ A).sum()))
    {'proj': (2, 8, 6)}
    proj 48.0
    """
    return AdapterFile(Path(path), check_finite, modules)


def check_finite(where: str, module: str, A: torch.Tensor, B: torch.Tensor) -> None:
    """Raise `LorakernError` if A or B holds NaN or infinity."""
    for letter, tensor in (("A", A), ("B", B)):
        if not all_finite(tensor):
            bad = tensor.numel() - int(tensor.isfinite().sum())
            raise LorakernError(
                f"{where}lora_{letter} of {module} has {bad} values that are NaN or infinite; the training or the "
                "merge went wrong, or pass check_finite=False to take them as they are"
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorakernError(f"{path}: the adapter cannot be read ({error}); check the file and its rights") from error
