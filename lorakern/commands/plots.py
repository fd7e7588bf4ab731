"""The file that --plot names."""

from pathlib import Path

from lorakern.errors import LorakernError


def check_plot(path: Path | None) -> None:
    """Raise before the work is done where a plot could not be drawn or written."""
    if path is not None:
        import matplotlib  # noqa: F401  ModuleNotFoundError says what to install

        if path.is_dir() or not path.absolute().parent.is_dir():
            raise LorakernError(f"--plot {path} must be a file in a directory that exists")


def write_plot(path: Path, content: bytes) -> None:
    """Write under another name in the same directory, then rename: never half a file."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise LorakernError(f"--plot {path} cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
