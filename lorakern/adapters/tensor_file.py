"""An open safetensors file whose header was checked: its tensors one at a time, or all of them mapped."""

import hashlib
import os
import weakref
from pathlib import Path

import torch

from lorakern.adapters.safetensors_header import DTYPES, TensorInfo, read_header
from lorakern.errors import LorakernError

_HASHED_BYTES = 4 << 20  # at a time


class TensorFile:
    """The tensors of one safetensors file. It stays open, so a file that is renamed over it changes nothing here."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as stream:
            self.tensors, self.metadata, self._data_begin = read_header(stream, file)
            self._descriptor = os.dup(stream.fileno())
        # closes at the latest when the object goes, without the warning of a file object
        self.close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, name: str) -> torch.Tensor:
        """A copy in memory. A mapping would be simpler, but its pages stay with the process once they were touched."""
        if not self.close.alive:
            raise LorakernError(f"{self.file}: the adapter was closed; read it while it is open")
        info = self.tensors[name]
        data = torch.empty(info.end - info.begin, dtype=torch.uint8)
        left, position = memoryview(data.numpy()), self._data_begin + info.begin
        while left:
            count = os.preadv(self._descriptor, [left], position)
            if not count:
                raise LorakernError(f"{self.file}: the file was cut short while it was read; save it again")
            left, position = left[count:], position + count
        return _typed(data, info)

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal."""
        digest, position = hashlib.sha256(), 0
        while part := os.pread(self._descriptor, _HASHED_BYTES, position):
            digest.update(part)
            position += len(part)
        return digest.hexdigest()

    def map(self) -> dict[str, torch.Tensor]:
        """Views of the file, mapped privately: writing to one changes no file."""
        size = self._data_begin + max((info.end for info in self.tensors.values()), default=0)
        whole = torch.UntypedStorage.from_file(str(self.file), shared=False, nbytes=size)
        if not os.path.samestat(os.fstat(self._descriptor), os.stat(self.file)):
            raise LorakernError(f"{self.file}: the file was replaced while it was read; load it again")
        tensors = {}
        for name, info in self.tensors.items():
            # a storage of its own, so that copying or pickling one tensor does not take the whole file along
            storage = whole[self._data_begin + info.begin : self._data_begin + info.end]
            tensors[name] = _typed(torch.empty(0, dtype=torch.uint8).set_(storage), info)
        return tensors


def _typed(data: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    dtype = DTYPES[info.dtype]
    # a file may place a tensor across its dtype's alignment
    data = data.clone() if data.data_ptr() % dtype.itemsize else data
    return data.view(dtype).view(info.shape)
