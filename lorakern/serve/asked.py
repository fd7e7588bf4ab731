"""Bodies of completion requests as OpenAI's clients send them, and what of it this server does."""

import json
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorakern.adapters.json_file import show
from lorakern.serve.errors import ApiError
from lorakern.serve.names import AUTO, BASE

MAX_BODY_BYTES = 8 << 20
# decoding is greedy and there is one answer: of these, only what changes nothing
_NEUTRAL: dict[str, tuple] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# these change no answer here
_IGNORED = ("user", "seed", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier")
Count = Field(default=None, ge=1)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's own; nothing is padded here


class Asked(_Strict):
    """What both kinds of completion have."""

    model: str
    max_tokens: int | None = Count
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def options(self, default_tokens: int) -> dict[str, Any]:
        """For the engine's `submit`."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stop:
            raise ApiError(400, "stop holds an empty text, which is everywhere; leave it out", "invalid_value", "stop")
        adapters = {AUTO: None, BASE: ()}.get(self.model, self.model)
        return {"max_new_tokens": self.limit() or default_tokens, "stop": stop, "adapters": adapters}

    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Completion(Asked):
    """POST /v1/completions: the prompt as it is, without a template."""

    prompt: str | list[int] | list[str]

    def text(self) -> str | list[int]:
        """The one prompt."""
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            if len(self.prompt) > 1:
                message = f"prompt holds {len(self.prompt)} prompts; send each in a request of its own"
                raise ApiError(400, message, "invalid_value", "prompt")
            return self.prompt[0]
        return self.prompt


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class Chat(Asked):
    """POST /v1/chat/completions: the messages go through the chat template; the user's last one finds adapters."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Count

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def query(self) -> str:
        """The user's last words."""
        said = [message.plain()["content"] for message in self.messages if message.role == "user"]
        if not said:
            raise ApiError(400, "messages holds none of the role user; add one", "invalid_value", "messages")
        return said[-1]


Kind = TypeVar("Kind", bound=Asked)


async def read(request: Request, kind: type[Kind]) -> Kind:
    """The body of a request.

    Raises:
        ApiError: 400 that names the field, 413 for a body of over 8 MiB.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes; send a shorter prompt", "too_large")
    try:
        fields = json.loads(body)
        # half a surrogate is JSON, but no text
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error}); send one object", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {show(fields)}; send a JSON object", "invalid_json")
    try:
        return kind.model_validate(_without_neutral(fields))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{field}: {first['msg']}; correct that field", "invalid_value", field) from None


def _without_neutral(fields: dict[str, Any]) -> dict[str, Any]:
    for name, takes in _NEUTRAL.items():
        if fields.get(name) is not None and fields[name] not in takes:
            raise ApiError(
                400,
                f"{name} is {show(fields[name])}; decoding is greedy and gives one plain answer, so leave it out "
                f"or give {' or '.join(json.dumps(value) for value in takes)}",
                "unsupported_value",
                name,
            )
    return {name: value for name, value in fields.items() if name not in _NEUTRAL and name not in _IGNORED}
