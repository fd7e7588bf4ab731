"""Adapters by name, of which those in use are in slots: the rest stay in their files, mapped into memory."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import Any

from lorakern.adapters import LoraAdapter, LoraFactors
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.mixture._checks import check_name
from lorakern.mixture._threads import release_team
from lorakern.mixture.layers import MixtureLayers

Source = Mapping[str, LoraFactors] | str | os.PathLike[str]


@dataclass(eq=False)
class Entry:
    """An adapter of the pool. `slot` is None while it is in no slot, `ready` whether what is in the slot is whole."""

    name: str
    adapter: Mapping[str, LoraFactors] = field(repr=False)
    slot: int | None = None
    ready: bool = False
    pins: int = 0
    last_use: int = 0
    removed: bool = False
    error: Exception | None = None


class AdapterPool:
    """Adapters that come and go while a model runs. A thread of its own fills slots, off the way of requests.

    Args:
        layers: their slots.
        on_ready: called from the loading thread when an adapter is in its slot.
    """

    def __init__(self, layers: MixtureLayers, on_ready: Callable[[], None]) -> None:
        self._layers = layers
        self._on_ready = on_ready
        self._entries: dict[str, Entry] = {}
        self._owners: list[Entry | None] = [None] * layers.slots
        self._lock = threading.Lock()
        self._uses = count()
        self._to_load: SimpleQueue[Entry | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._load_all, name="lorakern-load", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """In the order of upload."""
        return list(self._entries)

    @property
    def loaded(self) -> int:
        """How many slots are filled."""
        return sum(owner is not None and owner.ready for owner in self._owners)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def check(self, op: str, name: str, source: Source) -> Mapping[str, LoraFactors]:
        """The adapter, mapped into memory if it is in files.

        Raises:
            LorakernError: a name that is none, files that hold no adapter, or one that does not fit the model.
        """
        check_name(name)
        adapter = source if isinstance(source, Mapping) else self._open(source)
        self._layers.fit(op, name, adapter)
        return adapter

    def add(self, op: str, name: str, source: Source, replace: bool = False) -> None:
        adapter = self.check(op, name, source)
        with self._lock:
            if old := self._entries.get(name):
                if not replace:
                    raise LorakernError(f"{op}: adapter {show(name)} is there already; remove it first, or replace it")
                self._take_away(old)
            self._entries[name] = Entry(name, adapter)

    def remove(self, op: str, name: str) -> None:
        """Nobody gets it any more; those who have it keep it until they release it."""
        with self._lock:
            if name not in self._entries:
                raise LorakernError(f"{op}: no adapter {show(name)} is there; there are {show(self.names)}")
            self._take_away(self._entries[name])

    def find(self, names: Sequence[str]) -> list[Entry]:
        """
        Raises:
            LorakernError: a name that is not there.
        """
        with self._lock:
            if missing := [name for name in names if name not in self._entries]:
                raise LorakernError(f"adapters: no adapter {show(missing[0])} is there; there are {show(self.names)}")
            return [self._entries[name] for name in names]

    def acquire(self, entries: Sequence[Entry]) -> bool:
        """Give all of them slots until `release`, and have them loaded; or, with too few slots free, none of them."""
        with self._lock:
            missing = [entry for entry in entries if entry.slot is None]
            wanted = {id(entry) for entry in entries}
            free = [slot for slot, owner in enumerate(self._owners) if owner is None]
            idle = [o for o in self._owners if o is not None and not o.pins and o.ready and id(o) not in wanted]
            idle.sort(key=lambda owner: owner.last_use)
            if len(missing) > len(free) + len(idle):
                return False
            for entry in missing:
                if not free:
                    free.append(self._vacate(idle.pop(0)))
                entry.slot = free.pop(0)
                self._owners[entry.slot] = entry
                self._to_load.put(entry)
            for entry in entries:
                entry.pins += 1
            return True

    def release(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            for entry in entries:
                entry.pins -= 1
                entry.last_use = next(self._uses)
                self._drop_if_unused(entry)

    def close(self) -> None:
        self._to_load.put(None)
        self._thread.join()

    def _open(self, source: Any) -> LoraAdapter:
        return LoraAdapter.load(source)

    def _take_away(self, entry: Entry) -> None:
        del self._entries[entry.name]
        entry.removed = True
        self._drop_if_unused(entry)

    def _vacate(self, entry: Entry) -> int:
        slot, entry.slot, entry.ready = entry.slot, None, False
        self._owners[slot] = None
        return slot

    def _drop_if_unused(self, entry: Entry) -> None:
        # one that is being loaded is dropped when that is done; one that could not be may be tried anew
        if not entry.pins and entry.slot is not None and (entry.error or (entry.removed and entry.ready)):
            self._vacate(entry)
            entry.error = None

    def _load_all(self) -> None:
        while (entry := self._to_load.get()) is not None:
            try:
                self._layers.load(entry.slot, entry.name, self._layers.fit("load", entry.name, entry.adapter))
            except Exception as error:  # the requests that wait for it are told
                with self._lock:
                    entry.error = error
                    self._drop_if_unused(entry)
            else:
                with self._lock:
                    entry.ready = True
                    self._drop_if_unused(entry)
            release_team()
            self._on_ready()
