"""Who may do what: the key for uploads and deletions, and no requests that a web page elsewhere makes."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.serve.errors import ApiError


def check_start(host: str, key: str | None) -> None:
    """Raises `LorakernError` for a server that anyone in the network could change."""
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise LorakernError("--api-key must be printable ASCII without spaces around it; give another key")
    if key is None and not is_loopback(host):
        raise LorakernError(
            f"--host {host} can be reached from other machines, and without a key anyone there could upload and delete "
            "adapters; set LORAKERN_API_KEY (or --api-key), or take --host 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class KeyCheck:
    """A dependency of the routes that change something: `Authorization: Bearer KEY`, where the server has a key."""

    def __init__(self, key: str | None) -> None:
        self._key = None if key is None else key.encode()

    async def __call__(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.encode("latin-1") if scheme.lower() == "bearer" else b""
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise ApiError(
                401,
                "uploads and deletions need the server's key; send `Authorization: Bearer KEY`",
                "wrong_key" if given else "no_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class LocalOnly:
    """Middleware of a server without a key: it answers to the names of this machine, and to no page of another site.

    A browser would otherwise send a page's uploads to a server on its machine (cross-site request forgery), also under
    a host name that was made to mean 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _refusal(Request(scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)


def _refusal(request: Request) -> ApiError | None:
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if not is_loopback(_name(f"//{host}")):
        return ApiError(403, f"Host is {show(host)}; a server without a key answers on localhost only", "wrong_host")
    if origin is not None and _place(origin) != _place(f"//{host}"):
        return ApiError(403, f"Origin is {show(origin)}; pages of other sites are not served", "wrong_origin")
    return None


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _place(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""
