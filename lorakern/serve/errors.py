"""Errors as clients of OpenAI's API read them: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorakern.errors import LorakernError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success; the message says what to do next, `code` is one of few words."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def install(app: FastAPI) -> None:
    """Answer all errors in this shape."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(LorakernError)
    async def refused(request: Request, error: LorakernError) -> JSONResponse:
        return ApiError(400, str(error), "invalid_value").response()

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: "there is nothing at this path", 405: "this path takes another method"}
        message = f"{known.get(error.status_code, error.detail)}: {request.method} {request.url.path}"
        headers = dict(error.headers or {})
        return ApiError(error.status_code, message, "no_route", headers=headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # the server's log has the traceback
        return ApiError(500, "the server failed at this request; its log says why", "internal_error").response()
