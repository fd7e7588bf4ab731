"""The process of `lorakern serve`: checks first, then the model, then the port."""

import contextlib
import ctypes
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from lorakern.errors import LorakernError

_M_ARENA_MAX = -8  # of glibc's mallopt


def serve(app: FastAPI, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` is called with the address when requests are taken.

    Raises:
        LorakernError: the port cannot be had.
    """
    taken = bind(host, port)
    name = f"[{host}]" if taken.family == socket.AF_INET6 else host
    ready(f"http://{name}:{taken.getsockname()[1]}")
    # the engine has threads of its own: one event loop is enough for what is left
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    # Ctrl-C has ended the server in good order by then
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[taken])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise LorakernError(f"--host {host} --port {port} cannot be had ({error}); give another port, or 0") from None


def log_to_stderr() -> None:
    """What the server has to say, one line each."""
    logging.basicConfig(format="lorakern: %(message)s")
    # a malformed upload is its client's matter, who is told
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def check_folder(folder: Path) -> None:
    """Raises `LorakernError` for --adapters that is a file, before the model is loaded."""
    if folder.exists() and not folder.is_dir():
        raise LorakernError(f"--adapters {folder} is a file; give a folder, it is made if it is not there")


def limit_arenas(count: int = 2) -> None:
    """Let glibc's malloc have so many arenas, in place of eight a core; other allocators are left alone.

    Each thread of a new OpenMP team takes whichever arena is free, and leaves in it what it does not give back: with
    many arenas a server grew by 0.1 MB a request over its first two thousand.
    """
    if os.name == "posix" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_ARENA_MAX, count)
