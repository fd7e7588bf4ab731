"""`AdapterWriter`: a PEFT adapter written module by module."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from lorakern.adapters.adapter_file import check_finite as require_finite
from lorakern.adapters.factors import LoraFactors, checked
from lorakern.adapters.folder_update import FolderUpdate
from lorakern.adapters.json_file import show
from lorakern.adapters.peft_config import CONFIG_NAME, AdapterConfig, make_config, parse_config
from lorakern.adapters.peft_files import CARD_NAME, WEIGHTS_NAME, peft_scales
from lorakern.adapters.peft_refusals import PREFIX
from lorakern.adapters.safetensors_header import DTYPE_NAMES, DTYPES, TensorInfo, header_bytes
from lorakern.errors import LorakernError

_COPY_BYTES = 4 << 20


class AdapterWriter:
    """Write an adapter in PEFT format, one module at a time: peak memory is that of one module.

    `path`/adapter_model.safetensors gets the factors with their dtype and bits, `path`/adapter_config.json what PEFT
    needs to give every module its rank and scale: r and lora_alpha are the most common ones, rank_pattern and
    alpha_pattern name the modules that differ. Factors are kept in a temporary file in `path` until the `with` block
    ends. Then all files are written and synced under temporary names; the old config goes, the new tensors take
    their name, the new config takes its own. So after a crash or a kill at any moment there is the old adapter, the new
    one, or a directory without a config, which nothing loads: never a mixture. If the block raises, or writing fails,
    `path` is as it was. What a killed writer leaves behind (.lorakern-*.tmp) is removed by the next one.

    Args:
        path: a directory; it is made if it does not exist. It may be the one that the modules are being read from.
        base_model_name_or_path, fan_in_fan_out, use_rslora, task_type: as in `LoraAdapter`.
        check_finite: refuse NaN and infinity.

    Attributes, which may be set until the block ends:
        card: text for `path`/README.md, or None to leave one that is there.
        config: the `AdapterConfig` to write, or None to have it made; afterwards the one that was written.

    Raises `LorakernError` for no modules, a module twice, factors that `LoraAdapter` refuses, a config that does not
    give them back, a `path` that is a file or cannot be written, or that another writer is writing to.

    Format: https://github.com/huggingface/peft (0.21.2).

    >>> import tempfile, torch
    >>> from lorakern.adapters import AdapterWriter, LoraAdapter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with AdapterWriter(folder, base_model_name_or_path="my/model") as writer:
    ...         for layer in range(3):
    ...             writer.add(f"layers.{layer}.proj", (torch.ones(2, 8), torch.ones(6, 2), layer / 2))
    ...     adapter = LoraAdapter.load(folder)
    >>> [factors.scale for factors in adapter.values()], adapter.config.base_model_name_or_path
    ([0.0, 0.5, 1.0], 'my/model')
    """

    config: AdapterConfig | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        base_model_name_or_path: str | None = None,
        fan_in_fan_out: bool = False,
        use_rslora: bool = False,
        task_type: str | None = None,
        card: str | None = None,
        check_finite: bool = True,
    ) -> None:
        self.path = Path(path)
        self.card = card
        self.config = None
        self._check_finite = check_finite
        self._options = {
            "base_model_name_or_path": base_model_name_or_path,
            "fan_in_fan_out": fan_in_fan_out,
            "use_rslora": use_rslora,
            "task_type": task_type,
        }
        # a bad option is to be told before hours of computing
        make_config({"any": (1, 1.0)}, **self._options)
        self._tensors: dict[str, TensorInfo] = {}
        self._ranks_scales: dict[str, tuple[int, float]] = {}
        self._update: FolderUpdate | None = None

    def __enter__(self) -> "AdapterWriter":
        with self._writing():
            if self.path.exists() and not self.path.is_dir():
                raise LorakernError(f"{self.path}: this is a file; an adapter is saved to a directory, give one")
            for file in (self.path / name for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME)):
                if file.is_dir():
                    raise LorakernError(f"{file}: this is a directory, where a file is to be written; remove it")
            self._update = FolderUpdate(self.path)
        return self

    def add(self, module: str, factors: LoraFactors | tuple[torch.Tensor, torch.Tensor, float]) -> None:
        """Write the factors of one more module, a `LoraFactors` or a tuple (A, B, scale), on any device."""
        if self._update is None:
            raise LorakernError(
                "AdapterWriter.add works inside its with block only; write `with AdapterWriter(path) as w:`"
            )
        A, B, scale = checked(module, factors)
        if module in self._ranks_scales:
            raise LorakernError(f"{self.path}: {module} was added already; add every module once")
        if self._check_finite:
            require_finite("", module, A, B)
        with self._writing():
            written = {
                f"{PREFIX}{module}.lora_{letter}.weight": _append(self._update.data, tensor)
                for letter, tensor in (("A", A), ("B", B))
            }
        self._tensors |= written
        self._ranks_scales[module] = (A.shape[0], scale)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        update, self._update = self._update, None
        with self._writing():
            try:
                if kind is None:
                    self._commit(update)
            finally:
                update.discard()

    def _commit(self, update: FolderUpdate) -> None:
        if not self._tensors:
            raise LorakernError(f"{self.path}: no module was added; an adapter needs at least one")
        config = self.config or make_config(self._ranks_scales, **self._options)
        text = json.dumps(config.to_json(), indent=2).encode()
        self._check_reload(text)
        names = [WEIGHTS_NAME, CONFIG_NAME]
        if self.card is not None:
            names.insert(1, CARD_NAME)
            update.create(CARD_NAME).write(_encoded(self.card))
        _copy_sorted(update.data, update.create(WEIGHTS_NAME), self._tensors, self.path / WEIGHTS_NAME)
        update.create(CONFIG_NAME).write(text)
        update.commit(names)
        self.config = config

    def _check_reload(self, text: bytes) -> None:
        """Raise unless the config that is to be written gives every module its rank and scale, as PEFT will read it."""
        file = self.path / CONFIG_NAME
        ranks = {module: rank for module, (rank, _) in self._ranks_scales.items()}
        for module, scale in peft_scales(ranks, parse_config(text, file), file).items():
            given = self._ranks_scales[module][1]
            # alpha / r may be a unit in the last place away from the scale that alpha was made of
            if not math.isclose(scale, given, rel_tol=1e-15, abs_tol=0.0):
                raise LorakernError(
                    f"{file}: the config gives {module} the scale {scale}, its factors came with {given}; set config "
                    "to None to have one made"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LorakernError(
                f"{self.path}: the adapter cannot be saved ({error}); give a directory to write to"
            ) from error


def _encoded(card: str) -> bytes:
    try:
        return card.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise LorakernError(f"card must be text that UTF-8 can hold, got {show(card)} ({error})") from None


def _append(stream: BinaryIO, tensor: torch.Tensor) -> TensorInfo:
    """Write the tensor's bytes; the offsets are those in `stream`."""
    data = tensor.detach().cpu().contiguous()
    begin = stream.tell()
    stream.write(memoryview(data.view(-1).view(torch.uint8).numpy()))
    return TensorInfo(DTYPE_NAMES[data.dtype], tuple(data.shape), begin, stream.tell())


def _copy_sorted(source: BinaryIO, target: BinaryIO, tensors: dict[str, TensorInfo], file: Path) -> None:
    """Write a safetensors file with tensors from `source`, the widest dtype first so that each lies aligned."""
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    begin, placed = 0, dict(tensors)  # the header keeps the order in which the modules were added
    for name in order:
        info = tensors[name]
        placed[name] = info._replace(begin=begin, end=begin + info.end - info.begin)
        begin = placed[name].end
    target.write(header_bytes(placed, file))
    for name in order:
        left = tensors[name].end - source.seek(tensors[name].begin)
        while left:
            left -= target.write(source.read(min(left, _COPY_BYTES)))
