"""Adapters that a command line names, opened and checked against each other; and the folder that it writes to."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from lorakern.adapters import AdapterFile, LoraFactors, open_adapter
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_LEFT_BEHIND = ".lorakern-*.tmp"  # by a writer that was killed


class Source(NamedTuple):
    """An adapter as the user wrote it, and where that is."""

    name: str
    path: Path


def sources(names: Iterable[str], folder: Path | str = "") -> tuple[Source, ...]:
    """`names` as paths, relative ones from `folder` on."""
    return tuple(Source(name, Path(folder) / name) for name in names)


@contextmanager
def opened(found: Sequence[Source], *, check_finite: bool = True) -> Iterator[list[AdapterFile]]:
    """The adapters, open until the block ends."""
    with ExitStack() as stack:
        yield [stack.enter_context(open_adapter(source.path, check_finite=check_finite)) for source in found]


def base_model(found: Sequence[Source], adapters: Sequence[AdapterFile], given: str | None, how: str) -> str | None:
    """The base model that the adapters name, or the one that was given; `how` says how to give one."""
    if given is not None:
        return given
    named = [(s.name, a.config.base_model_name_or_path) for s, a in zip(found, adapters, strict=True)]
    named = [(name, base) for name, base in named if base]
    for name, base in named:
        first, its_base = named[0]
        if base != its_base:
            raise LorakernError(
                f"{name} is for the base model {show(base)}, {first} for {show(its_base)}; adapters of different bases "
                f"do not belong together, or, if these are names of one model, {how} says which one to write"
            )
    return named[0][1] if named else None


def check_output(out: Path, found: Sequence[Source], force: bool) -> None:
    """Raise unless an adapter may be written to the folder `out`, which is not where one of the inputs is."""
    try:
        for source in found:
            folder = source.path if source.path.is_dir() else source.path.parent
            if out.exists() and folder.exists() and out.samefile(folder):
                raise LorakernError(f"{out}: --output is where the input {source.name} is; give another directory")
        if out.exists() and not out.is_dir():
            raise LorakernError(f"{out}: --output is a file; an adapter is a directory, give the name of one")
        there = set(out.iterdir()) - set(out.glob(_LEFT_BEHIND)) if out.is_dir() else ()
        if there and not force:
            raise LorakernError(
                f"{out}: --output exists and is not empty; give another directory, or --force to replace the adapter "
                "that is there"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, LorakernError):
            raise
        raise LorakernError(f"{show(str(out))}: --output cannot be a directory ({error}); give another one") from None


def on_device(factors: LoraFactors, device: torch.device | None) -> LoraFactors:
    """The factors where they are to be computed with."""
    return factors if device is None else LoraFactors(factors.A.to(device), factors.B.to(device), factors.scale)


def read_device(name: str | None) -> torch.device | None:
    """The device of that name; raises unless this machine can compute there."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LorakernError(
            f"--device {show(name)} cannot be used ({reason}); give cpu, or cuda on a machine with a GPU"
        ) from None
    return device


def read_dtype(name: str | None, where: str = "--dtype") -> torch.dtype | None:
    """The dtype of that name."""
    if name is not None and name not in DTYPES:
        raise LorakernError(f"{where} must be one of {', '.join(DTYPES)}, got {show(name)}")
    return None if name is None else DTYPES[name]


def read_rank(text: str | None) -> int | float | None:
    """A number of ranks, or a share of the energy, as the ops take it.

    >>> read_rank("8"), read_rank("0.95"), read_rank(None)
    (8, 0.95, None)
    """
    for read in (int, float):
        try:
            rank = None if text is None else read(text)
        except ValueError:
            continue
        if rank is None or (rank >= 1 if read is int else 0 < rank < 1):
            return rank
    raise LorakernError(
        f"--rank must be a positive integer, or a share of the energy above 0 and below 1, got {show(text)}"
    )


def read_weights(text: str | None, where: str = "--weights") -> list[float] | None:
    """Numbers with commas between them.

    >>> read_weights("0.5,-0.25")
    [0.5, -0.25]
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise LorakernError(f"{where} must be numbers, such as {where} 0.5 0.3 0.2, got {show(text)}") from None
