"""POST /v1/completions and /v1/chat/completions, GET /v1/models: OpenAI's shapes, whole or as a stream."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.serve.asked import Asked, Chat, Completion, read
from lorakern.serve.desk import Answer, Desk
from lorakern.serve.errors import ApiError
from lorakern.serve.names import AUTO, BASE
from lorakern.serve.template import Template

# where a request says nothing: OpenAI's own for completions
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256
log = logging.getLogger("lorakern.serve")


class Shape(Protocol):
    """What differs between the two kinds of completion."""

    id: str
    whole: str
    part: str

    def choice(self, text: str) -> dict[str, Any]: ...

    def delta(self, text: str | None, first: bool) -> dict[str, Any]: ...


class TextShape:
    whole = part = "text_completion"
    id = "cmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None}

    def delta(self, text: str | None, first: bool) -> dict[str, Any]:
        return {"text": text or "", "logprobs": None}


class ChatShape:
    whole, part = "chat.completion", "chat.completion.chunk"
    id = "chatcmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}

    def delta(self, text: str | None, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        return {"delta": role | ({} if text is None else {"content": text}), "logprobs": None}


def router(desk: Desk, engine: Any, template: Template) -> APIRouter:
    """The routes under /v1."""
    routes, started = APIRouter(prefix="/v1"), int(time.time())

    async def submit(asked: Asked, prompt: str | list[int], options: dict[str, Any]) -> Answer:
        try:
            return await desk.submit(prompt, **options)
        except LorakernError:
            # it is told as OpenAI does if the reason is that there is no such adapter, or no longer
            _check_model(engine, asked.model)
            raise

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        asked = await read(request, Completion)
        answer = await submit(asked, asked.text(), asked.options(COMPLETION_TOKENS))
        return await _respond(request, asked, answer, TextShape())

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await read(request, Chat)
        options = asked.options(CHAT_TOKENS) | {"query": asked.query()}
        answer = await submit(asked, template([message.plain() for message in asked.messages]), options)
        return await _respond(request, asked, answer, ChatShape())

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "lorakern"}

    @routes.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model(name) for name in (AUTO, BASE, *engine.names)]})

    @routes.get("/models/{name}")
    async def one_model(name: str) -> JSONResponse:
        _check_model(engine, name)
        return JSONResponse(model(name))

    return routes


def _check_model(engine: Any, name: str) -> None:
    if name not in (AUTO, BASE) and name not in engine.names:
        message = f"there is no model {show(name)}; take auto, base, or an adapter that GET /v1/models lists"
        raise ApiError(404, message, "model_not_found", "model")


async def _respond(request: Request, asked: Asked, answer: Answer, shape: Shape) -> Response:
    head = {"id": f"{shape.id}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        return EventStream(_events(head, asked, answer, shape), answer)
    made = await answer.result_for(request)
    choice = {"index": 0, "finish_reason": made.finish_reason, **shape.choice(made.text)}
    body = {"object": shape.whole, "choices": [choice], "usage": _usage(made), **_weights(made)}
    return JSONResponse(head | body)


async def _events(head: dict[str, Any], asked: Asked, answer: Answer, shape: Shape) -> AsyncIterator[str]:
    """The text as it comes; the last piece says why it ends, and which adapters it came from."""

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "finish_reason": finish, **delta}
        usage = {"usage": None} if asked.wants_usage else {}
        return _event(head | {"object": shape.part, "choices": [choice]} | usage | more)

    try:
        first = True
        async for text in answer.pieces():
            yield event(shape.delta(text, first))
            first = False
        made = answer.made()
    except ApiError as error:
        yield _event(error.body())
        return
    except Exception:
        log.exception("a request failed in the engine")
        message = "the engine failed at this request; the server's log says why"
        yield _event(ApiError(500, message, "internal_error").body())
        return
    yield event(shape.delta(None, first), made.finish_reason, **_weights(made))
    if asked.wants_usage:
        yield _event(head | {"object": shape.part, "choices": [], "usage": _usage(made)})
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, the engine does not go on with the request after it."""

    def __init__(self, events: AsyncIterator[str], answer: Answer) -> None:
        # a proxy that buffers would keep the text until its end
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(made: Any) -> dict[str, int]:
    prompt, new = made.prompt_tokens, len(made.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _weights(made: Any) -> dict[str, Any]:
    return {"lorakern": {"adapters": made.adapters}}
