"""GET /: the page, with a policy under which only its own script and style run."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def router() -> APIRouter:
    """The one route."""
    html = (files("lorakern.serve") / "page.html").read_text(encoding="utf-8")
    rules = [
        "default-src 'none'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    rules += [f"{tag}-src '{_hash(html, tag)}'" for tag in ("script", "style")]
    headers = {"Content-Security-Policy": "; ".join([*rules, "img-src data:"]), "X-Content-Type-Options": "nosniff"}
    routes = APIRouter()

    @routes.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return routes


def _hash(html: str, tag: str) -> str:
    """Of the text between the tags, as a policy names it."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
