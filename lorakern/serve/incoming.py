"""An upload as it comes in: multipart/form-data into a quarantine folder, every size bounded while it is read."""

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from lorakern.adapters.json_file import show
from lorakern.adapters.peft_config import CONFIG_NAME
from lorakern.adapters.peft_files import WEIGHTS_NAME
from lorakern.errors import LorakernError
from lorakern.mixture._checks import check_texts
from lorakern.serve.errors import ApiError
from lorakern.serve.names import check_name

MAX_CONFIG_BYTES, MAX_TEXTS_BYTES, MAX_TEXTS = 1 << 20, 1 << 20, 1000
# around each part: its headers, at most so many lines of at most so many bytes
_PART_HEADERS, _HEADER_BYTES = 8, 4096
# of a whole body, besides its fields: boundaries, headers, and what may stand before and after the parts
_AROUND = 1 << 16
FILES = {"config": CONFIG_NAME, "weights": WEIGHTS_NAME}


@dataclass
class Part:
    """The part that is being read: a file in the quarantine, or a short text."""

    field: str
    limit: int
    size: int = 0
    text: bytearray = field(default_factory=bytearray)
    stream: BinaryIO | None = None


class Incoming:
    """The fields of one upload: `feed` takes the body in pieces of any size, `finish` says what it was.

    Args:
        content_type: the request's header.
        folder: where the two files go, under the names of PEFT; the client's names are not used.
        max_weights: bytes.

    Raises:
        ApiError: 4xx, as soon as it is known that the upload is no good; nothing more is written then.
    """

    def __init__(self, content_type: str, folder: Path, max_weights: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(
                415,
                f"Content-Type is {show(content_type)}; send multipart/form-data with a boundary, as "
                "`curl -F name=NAME -F config=@adapter_config.json -F weights=@adapter_model.safetensors` does",
                "not_multipart",
            )
        self._limits = {"name": 1024, "texts": MAX_TEXTS_BYTES, "replace": 16}
        self._limits |= {"config": MAX_CONFIG_BYTES, "weights": max_weights}
        self._left = sum(self._limits.values()) + _AROUND
        self._folder, self._digest = folder, hashlib.sha256()
        self._parts: dict[str, Part] = {}
        self._part: Part | None = None
        self._header, self._disposition = (bytearray(), bytearray()), b""
        self._ended = False
        events = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        callbacks = {f"on_{event}": getattr(self, f"_{event}") for event in (*events, "headers_finished", "end")}
        try:
            self._parser = MultipartParser(
                boundary, callbacks, max_header_count=_PART_HEADERS, max_header_size=_HEADER_BYTES
            )
        except FormParserError as error:
            raise ApiError(400, f"Content-Type: {error}", "malformed") from None

    def feed(self, data: bytes) -> None:
        """The next bytes of the body."""
        self._left -= len(data)
        if self._left < 0:
            raise ApiError(413, "the body has more bytes than its fields may have together", "too_large")
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError(400, f"the multipart body is malformed: {error}", "malformed") from None

    def finish(self) -> tuple[str, list[str], bool, str]:
        """Name, texts, whether to replace, and the SHA-256 of the weights."""
        if not self._ended:
            raise ApiError(400, "the multipart body ends before its closing boundary; send it again", "malformed")
        for name in ("name", *FILES):
            if name not in self._parts:
                raise ApiError(400, f"the field {name} is missing; send name, config and weights", "missing", name)
        return self._name(), self._texts(), self._replace(), self._digest.hexdigest()

    def close(self) -> None:
        """Close the files, wherever the upload ended."""
        for part in (*self._parts.values(), *filter(None, [self._part])):
            if part.stream is not None:
                part.stream.close()

    def _name(self) -> str:
        name = self._decoded("name")
        try:
            return check_name(name)
        except LorakernError as error:
            raise ApiError(400, str(error), "bad_name", "name") from None

    def _texts(self) -> list[str]:
        if "texts" not in self._parts:
            return []
        try:
            texts = check_texts(json.loads(self._decoded("texts")))
            "".join(texts).encode()
        except (ValueError, RecursionError) as error:
            message = f"texts must be a JSON list of texts ({error}); leave the field out for no texts"
            raise ApiError(400, message, "bad_texts", "texts") from None
        if len(texts) > MAX_TEXTS:
            raise ApiError(400, f"texts holds {len(texts)} texts; give at most {MAX_TEXTS}", "bad_texts", "texts")
        return texts

    def _replace(self) -> bool:
        value = self._decoded("replace") if "replace" in self._parts else "false"
        if value not in ("true", "false"):
            raise ApiError(400, f"replace is {show(value)}; it is true or false", "malformed", "replace")
        return value == "true"

    def _decoded(self, name: str) -> str:
        try:
            return self._parts[name].text.decode()
        except UnicodeDecodeError as error:
            raise ApiError(400, f"{name} is not UTF-8 ({error})", "malformed", name) from None

    def _part_begin(self) -> None:
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = bytearray(), bytearray()
        if name.lower() == b"content-disposition":
            self._disposition = value
        elif name.lower() == b"content-transfer-encoding" and value.strip().lower() not in (
            b"binary",
            b"8bit",
            b"7bit",
        ):
            raise ApiError(400, f"Content-Transfer-Encoding is {show(value)}; send the bytes as they are", "malformed")

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode(errors="replace")
        if name not in self._limits:
            takes = ", ".join(self._limits)
            raise ApiError(400, f"field {show(name)} is unknown; an upload has {takes}", "unknown_field")
        if name in self._parts:
            raise ApiError(400, f"the field {name} is there twice; send it once", "duplicate_field", name)
        self._part = Part(name, self._limits[name])
        if name in FILES:
            _check_file_name(name, options.get(b"filename"))
            self._part.stream = (self._folder / FILES[name]).open("xb")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.size += end - start
        if part.size > part.limit:
            raise ApiError(
                413, f"{part.field} has more than {part.limit} bytes, the most it may", "too_large", part.field
            )
        if part.stream is None:
            part.text += data[start:end]
            return
        view = memoryview(data)[start:end]
        part.stream.write(view)
        if part.field == "weights":
            self._digest.update(view)

    def _part_end(self) -> None:
        if self._part.stream is not None:
            self._part.stream.close()
        self._parts[self._part.field], self._part = self._part, None

    def _end(self) -> None:
        self._ended = True


def _check_file_name(name: str, file_name: bytes | None) -> None:
    """The name is not used; but one that is a path, or of another kind of file, says that something else is meant."""
    if file_name is None:
        raise ApiError(400, f"the field {name} is no file; send it as `-F {name}=@{FILES[name]}`", "not_a_file", name)
    text = file_name.decode(errors="replace")
    suffix = Path(FILES[name]).suffix
    if any(part in text for part in ("/", "\\", "..")) or not text.isprintable():
        message = f"the file name {show(text)} of {name} is a path; send a plain name, such as {FILES[name]}"
        raise ApiError(400, message, "bad_file_name", name)
    if not text.endswith(suffix):
        raise ApiError(
            400,
            f"the file {show(text)} of {name} is no {suffix} file; pickle files (.bin, .pt) and archives are not "
            "taken, save the adapter with PEFT as safetensors",
            "bad_file_name",
            name,
        )


async def read(request: Request, incoming: Incoming, seconds: float) -> None:
    """Feed the body of a request to `incoming`; a client that sends nothing for so many seconds is given up.

    Raises:
        ApiError: 408, 499 if the client leaves, or what `incoming` raises.
    """
    pieces = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(seconds):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise ApiError(408, f"nothing came for {seconds:g} seconds; send the upload again", "timeout") from None
        except ClientDisconnect:
            raise ApiError(499, "the client left before the end of its upload", "disconnected") from None
        if piece is None:
            return
        # the file system may be slow, and other clients' tokens are to flow meanwhile
        await asyncio.to_thread(incoming.feed, piece)
