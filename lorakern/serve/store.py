"""The adapters on disk. After a kill or a crash at any moment an adapter is there as a whole, or not at all.

    adapters/000017/adapter_config.json, adapter_model.safetensors, record.json
    quarantine/...      what is not an adapter yet, removed at the start
    lock                held by the one server that writes here

A folder's number says when it came; its name on disk says nothing of the adapter's name. A folder without a record is
no adapter: it is taken into the store by one rename, and out of it by removing the record.
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from lorakern.adapters.folder_update import sync
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.serve.record import Record

RECORD = "record.json"


class AdapterStore:
    """The folder of one server's adapters; what was left unfinished in it is removed here.

    Args:
        folder: made if it is not there.
        warn: told of a folder that holds a damaged record; it is left alone and its adapter is not served.

    Raises:
        LorakernError: another server is at work there, or it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], warn: Callable[[str], None]) -> None:
        self.folder = Path(folder)
        self._adapters, self._quarantine = self.folder / "adapters", self.folder / "quarantine"
        self._lock = threading.Lock()
        self._found: dict[str, tuple[Path, Record]] = {}
        try:
            for part in (self._adapters, self._quarantine):
                part.mkdir(parents=True, exist_ok=True)
            self._held = (self.folder / "lock").open("wb")
            self._hold()
            sync(self.folder)
            sync(self.folder.parent)
            for left in self._quarantine.iterdir():
                _remove_tree(left)
            self._next = self._read(warn)
        except OSError as error:
            raise LorakernError(
                f"{self.folder}: --adapters cannot be written ({error}); give another folder"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def records(self) -> list[Record]:
        """In the order of upload."""
        return [record for _, record in list(self._found.values())]

    def record(self, name: str) -> Record:
        """Raises `LorakernError` for a name that is not there."""
        return self._entry(name)[1]

    def path(self, name: str) -> Path:
        """The folder of an adapter in PEFT's format."""
        return self._entry(name)[0]

    def new_quarantine(self) -> Path:
        """An empty folder for an upload; the caller removes it unless it is published."""
        with self._lock:
            number, self._next = self._next, self._next + 1
        folder = self._quarantine / f"{number:06d}"
        folder.mkdir()
        return folder

    def discard(self, quarantine: Path) -> None:
        """Remove what an upload left; nothing if it was published."""
        shutil.rmtree(quarantine, ignore_errors=True)

    def publish(self, quarantine: Path, record: Record) -> None:
        """Make a quarantined folder an adapter, on the disk when this returns; one of its name makes place for it."""
        for file in quarantine.iterdir():
            sync(file)
        _write(quarantine / RECORD, record.to_json())
        with self._lock:
            # numbered anew: the last one of a name is the one that counts
            folder, self._next = self._adapters / f"{self._next:06d}", self._next + 1
            quarantine.rename(folder)
            sync(self._adapters)
            old = self._found.pop(record.name, None)
            self._found[record.name] = folder, record
            if old is not None:
                _take_out(old[0])

    def update(self, record: Record) -> None:
        """Write another record of an adapter that is there."""
        folder, _ = self._entry(record.name)
        temporary = self._quarantine / folder.name
        _write(temporary, record.to_json())
        temporary.replace(folder / RECORD)
        sync(folder)
        self._found[record.name] = folder, record

    def remove(self, name: str) -> None:
        """Take an adapter out, on the disk when this returns."""
        with self._lock:
            folder, _ = self._entry(name)
            _take_out(folder)
            del self._found[name]

    def close(self) -> None:
        """Let another server have the folder."""
        self._held.close()

    def _entry(self, name: str) -> tuple[Path, Record]:
        if name not in self._found:
            raise LorakernError(f"there is no adapter {show(name)}; GET /adapters lists them")
        return self._found[name]

    def _hold(self) -> None:
        try:
            fcntl.flock(self._held.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LorakernError(
                f"{self.folder}: another server has these --adapters; stop it, or give another folder"
            ) from None

    def _read(self, warn: Callable[[str], None]) -> int:
        """Find the adapters, the last one of each name, and remove all other folders; returns the next number."""
        folders = [path for path in self._adapters.iterdir() if path.name.isdecimal()]
        folders.sort(key=lambda path: int(path.name))
        for folder in folders:
            if not (folder / RECORD).is_file():
                _remove_tree(folder)
                continue
            try:
                record = Record.from_json((folder / RECORD).read_bytes(), folder / RECORD)
            except LorakernError as error:
                warn(f"not served: {error}")
                continue
            if old := self._found.pop(record.name, None):
                _take_out(old[0])
            self._found[record.name] = folder, record
        return max((int(folder.name) for folder in folders), default=-1) + 1


def _take_out(folder: Path) -> None:
    """Without a record it is no adapter, whatever comes of the rest."""
    (folder / RECORD).unlink(missing_ok=True)
    sync(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    sync(file.parent)
