"""The header of a safetensors file, checked in full before a byte of tensor data is touched.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The
header may end in spaces; the tensors follow each other without gap, in any order.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from lorakern.adapters.json_file import parse_object, show
from lorakern.errors import LorakernError

MAX_HEADER_BYTES = 32 << 20  # 90,000 tensors with long names need 16 MB; parsed Python objects are larger than the text
MAX_TENSOR_BYTES = 4 << 30  # rank 4096 of a layer 131072 wide in float64; a sparse file costs nothing and declares more
MAX_DIMS = 8
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32}  # only the alphas of kohya files
DTYPES = FLOATS | INTEGERS
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the data
    end: int


class Header(NamedTuple):
    tensors: dict[str, TensorInfo]  # in the order of the header
    metadata: dict[str, str]
    data_begin: int  # bytes from the start of the file


def read_header(stream: BinaryIO, file: Path) -> Header:
    """The header at the start of `stream`; `file` is its name in messages.

    Raises `LorakernError` for a file that is truncated, is not safetensors, or declares a tensor that its size and
    bytes do not agree with, that lies outside the file, overlaps another, is not floating point (an alpha may be an
    integer) or larger than any LoRA factor.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise LorakernError(
            f"{file}: the file has {size} bytes, but its first 8 announce a header of {length}; it is truncated or "
            "not a safetensors file, download or save it again"
        )
    if length > MAX_HEADER_BYTES:
        raise LorakernError(
            f"{file}: the header has {length} bytes, more than the {MAX_HEADER_BYTES} that an adapter may have; "
            "this is no LoRA adapter"
        )
    header = parse_object(stream.read(length), file, "the safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LorakernError(
            f"{file}: __metadata__ of the safetensors header must be an object of strings, got {show(metadata)}; "
            "the file is damaged, download or save it again"
        )
    tensors = {name: _tensor_info(name, entry, file) for name, entry in header.items()}
    _check_layout(tensors, size - 8 - length, file)
    return Header(tensors, metadata, 8 + length)


def header_bytes(tensors: Mapping[str, TensorInfo], file: Path) -> bytes:
    """What `read_header` reads, padded so that the data begins at a multiple of 8 bytes, as safetensors pads it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, begin, end) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise LorakernError(
            f"{file}: the header would take {len(text)} bytes, more than the {MAX_HEADER_BYTES} that an adapter may "
            "have; save fewer modules"
        )
    return len(text).to_bytes(8, "little") + text


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(name: str, entry: Any, file: Path) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            len(entry) == 3 and len(shape) <= MAX_DIMS and all(map(_is_count, [*shape, begin, end]))
        ):
            pass
        case _:
            raise LorakernError(
                f"{file}: the header entry of tensor {show(name)} must be "
                f'{{"dtype": str, "shape": [at most {MAX_DIMS} sizes], "data_offsets": [begin, end]}}, '
                f"got {show(entry)}; the file is damaged, download or save it again"
            )
    if dtype not in FLOATS and not (dtype in INTEGERS and name.endswith(".alpha")):
        raise LorakernError(
            f"{file}: tensor {show(name)} has dtype {show(dtype)}; LoRA factors are {', '.join(FLOATS)}: "
            "convert the adapter to bfloat16 and save it again"
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise LorakernError(
            f"{file}: tensor {show(name)} of shape {show(shape)} and dtype {dtype} does not take the {end - begin} "
            "bytes of its data_offsets; the file is damaged, download or save it again"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int, file: Path) -> None:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != position:
            raise LorakernError(
                f"{file}: tensor {show(name)} starts at byte {tensor.begin} of the data, where {position} was expected "
                "(tensors must follow each other without gap or overlap); the file is damaged, save it again"
            )
        position = tensor.end
    if position != data_bytes:
        raise LorakernError(
            f"{file}: the header declares {position} bytes of tensors, the file holds {data_bytes}; "
            f"it is {'truncated' if position > data_bytes else 'damaged'}, download or save it again"
        )
    for name, tensor in tensors.items():
        if tensor.end - tensor.begin > MAX_TENSOR_BYTES:
            raise LorakernError(
                f"{file}: tensor {show(name)} has {tensor.end - tensor.begin} bytes, more than the {MAX_TENSOR_BYTES} "
                "that a LoRA factor may have; this is no LoRA adapter"
            )
