"""Between HTTP and the engine: how many requests are taken, their text as it comes, and clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request

from lorakern.serve.errors import ApiError


class Answer:
    """A request in the engine, seen from the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._ticket: Any = None

    def on_token(self, text: str) -> None:
        """What the engine's thread calls."""
        self._call(self._pieces.put_nowait, text)

    def taken(self, ticket: Any, ended: Callable[[], None]) -> None:
        """The engine has it; `ended` is called in the event loop when it no longer does."""
        self._ticket = ticket

        def end() -> None:
            self._pieces.put_nowait(None)
            ended()

        ticket.add_done_callback(lambda *_: self._call(end))

    async def pieces(self) -> AsyncIterator[str]:
        """New text, until the engine is done with the request."""
        while (piece := await self._pieces.get()) is not None:
            yield piece

    async def result(self) -> Any:
        """The `Generation`, when it is there."""
        async for _ in self.pieces():
            pass
        return self.made()

    def made(self) -> Any:
        """The `Generation` of an answer whose pieces have ended.

        Raises:
            ApiError: 503, the engine was closed before its end. And what the engine failed with.
        """
        made = self._ticket.result(0)
        if made.finish_reason == "cancelled":
            raise ApiError(503, "the server is stopping and the answer is not whole; ask again", "stopping")
        return made

    async def result_for(self, request: Request) -> Any:
        """The `Generation`; the request is cancelled if its client leaves.

        Raises:
            ApiError: the client has left.
        """
        done, gone = asyncio.ensure_future(self.result()), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ApiError(499, "the client left before its answer", "disconnected")
            return done.result()
        finally:
            self.cancel()
            done.cancel()
            gone.cancel()

    def cancel(self) -> None:
        """Nobody waits for it any more; nothing happens if it is done."""
        if not self._ticket.done():
            self._ticket.cancel()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        # a loop that was closed has no one to tell
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


class Desk:
    """Hands requests to the engine, at most `limit` at once.

    Args:
        engine: a `MixtureModel`, or what has its `submit`.
        limit: requests that run or wait; there is a 429 for each one more.
    """

    def __init__(self, engine: Any, limit: int) -> None:
        self._engine, self._limit = engine, limit
        self._inside = 0

    async def submit(self, prompt: str | list[int], **options: Any) -> Answer:
        """Hand in a request; the options are those of the engine's `submit`.

        Raises:
            ApiError: 429, or 503 if the engine has stopped.
            LorakernError: the engine does not take it.
        """
        if self._inside >= self._limit:
            message = f"{self._limit} requests run or wait, as many as this server takes; try again in a second"
            raise ApiError(429, message, "overloaded", headers={"Retry-After": "1"})
        answer = Answer()
        self._inside += 1
        try:
            # it encodes the query, which is work
            ticket = await asyncio.to_thread(self._engine.submit, prompt, on_token=answer.on_token, **options)
        except BaseException:
            self._leave()
            check_engine(self._engine)
            raise
        answer.taken(ticket, self._leave)
        return answer

    def _leave(self) -> None:
        self._inside -= 1


def check_engine(engine: Any) -> None:
    """Raises `ApiError` 503 if the engine has failed and takes no more requests."""
    if engine.failure is not None:
        raise ApiError(503, "the engine has stopped, its log says why; restart the server", "engine_stopped")


async def _left(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
