"""Files of a folder replaced together, so that a crash or a kill at any moment leaves no mixture of old and new."""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lorakern.errors import LorakernError

_TEMPORARY = re.compile(r"\.lorakern-(?P<token>[0-9a-f]{16})-[\w.]+\.tmp")
_LOCK = "data"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems


class FolderUpdate:
    """New files beside the old ones under temporary names, moved into place by `commit` or removed by `discard`.

    `data` is a scratch file on the same file system. It carries the lock that tells a running update from the
    remains of a killed one: those are removed when the next update of the folder begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = [f for f in (folder, *folder.parents) if not f.exists()]
        self._token = secrets.token_hex(8)
        self._streams: dict[str, BinaryIO] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.data = self.create(_LOCK)
            self._begin()
        except BaseException:
            self.discard()
            raise

    def create(self, name: str) -> BinaryIO:
        """A new file that will be `name`."""
        self._streams[name] = self._temporary(name).open("xb+")
        return self._streams[name]

    def commit(self, names: Sequence[str]) -> None:
        """Move the files into place, the last one last: without it the folder holds nothing that anyone would load.

        The old files are moved aside in the opposite order, and moved back if anything fails.
        """
        for name in names:
            self._streams[name].flush()
            os.fsync(self._streams[name].fileno())
        moves = [
            (self.folder / name, self._temporary(f"old.{name}"))
            for name in reversed(names)
            if os.path.lexists(self.folder / name)
        ]
        moves += [(self._temporary(name), self.folder / name) for name in names]
        begun = []
        try:
            for source, target in moves:
                begun.append((source, target))
                sync(self.folder)  # each step is on the disk before the next one
                source.replace(target)
            sync(self.folder)
        except BaseException:
            for source, target in reversed(begun):
                if not os.path.lexists(source):
                    target.replace(source)
            raise

    def discard(self) -> None:
        """Remove all that is temporary, and the folder if this update made it and it is empty."""
        for stream in self._streams.values():
            with suppress(OSError):  # what could not be flushed is not wanted any more
                stream.close()
        self._remove(self._token)
        for folder in self._made:
            with suppress(OSError):  # there are files in it
                folder.rmdir()

    def _begin(self) -> None:
        try:
            if not _lock(self.data.fileno()):
                raise _busy(self.folder)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return  # remains cannot be told from a running update there, so they stay
        found = (_TEMPORARY.fullmatch(file.name) for file in self.folder.iterdir())
        for token in {match["token"] for match in found if match} - {self._token}:
            if not _has_ended(self._temporary(_LOCK, token)):
                raise _busy(self.folder)
            self._remove(token)

    def _temporary(self, name: str, token: str | None = None) -> Path:
        return self.folder / f".lorakern-{token or self._token}-{name}.tmp"

    def _remove(self, token: str) -> None:
        # the file with the lock goes last: while there are others, it is known whose they are
        lock = self._temporary(_LOCK, token)
        files = [file for file in self.folder.glob(self._temporary("*", token).name) if file != lock]
        for file in (*files, lock):
            file.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Whether the lock was free; it is ours until the descriptor is closed, or its process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_ended(lock: Path) -> bool:
    """Whether the update that `lock` belongs to is over."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _busy(folder: Path) -> LorakernError:
    return LorakernError(f"{folder}: another writer is at work there; wait until it is done, or give another directory")


def sync(path: Path) -> None:
    """Have a file or folder on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
