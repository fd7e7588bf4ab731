"""The header of a safetensors file, checked in full before a byte of tensor data is touched.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from lorakern.adapters.json_file import parse_object, show
from lorakern.errors import LorakernError

MAX_HEADER_BYTES = 32 << 20  # 90,000 tensors with long names need 16 MB; parsed Python objects are larger than the text
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the data
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor name to `TensorInfo`, in the order of the header.

    Raises `LorakernError` for a file that is truncated, is not safetensors, or declares a tensor that its size and
    bytes do not agree with, that lies outside the file, overlaps another, or is not floating point.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
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

    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(name, entry, file) for name, entry in header.items()}
    _check_layout(tensors, size - 8 - length, file)
    return tensors


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(name: str, entry: Any, file: Path) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if len(entry) == 3 and all(
            map(_is_count, [*shape, begin, end])
        ):
            pass
        case _:
            raise LorakernError(
                f"{file}: the header entry of tensor {show(name)} must be "
                '{"dtype": str, "shape": [sizes], "data_offsets": [begin, end]}, '
                f"got {show(entry)}; the file is damaged, download or save it again"
            )
    if dtype not in ITEM_BYTES:
        raise LorakernError(
            f"{file}: tensor {show(name)} has dtype {show(dtype)}; LoRA factors are {', '.join(ITEM_BYTES)}: "
            "convert the adapter to bfloat16 and save it again"
        )
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise LorakernError(
            f"{file}: tensor {show(name)} of shape {show(shape)} and dtype {dtype} does not take the {end - begin} "
            "bytes of its data_offsets; the file is damaged, download or save it again"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_layout(tensors: dict[str, TensorInfo], data_bytes: int, file: Path) -> None:
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
