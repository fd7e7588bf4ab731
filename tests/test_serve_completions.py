"""Completions in OpenAI's shapes: its own client on a real server, streams, refusals, overload, clients that leave."""

import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_fake import FakeEngine
from serve_server import adapter_parts, events, serving, wait_until

openai = pytest.importorskip("openai", reason="needs the package openai, in the extra test")

POET, COOK = ["rhyme verse ode", "sonnet rhyme"], ["stew broth soup", "boil broth"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store")) as server:
        assert server.upload(adapter_parts("poet", texts=POET))[0] == 201
        assert server.upload(adapter_parts("cook", texts=COOK))[0] == 201
        assert server.upload(adapter_parts("shy"))[0] == 201
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(text):
    return [{"role": "user", "content": text}]


def test_chat(client):
    made = client.chat.completions.create(model="auto", messages=asked("a rhyme"))
    assert made.choices[0].message.content == "poet+cook user: a rhyme"
    assert made.choices[0].finish_reason == "stop" and made.object == "chat.completion"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (3, 4, 7)
    assert made.lorakern == {"adapters": {"poet": 0.5, "cook": 0.5}}


def test_pinned_and_base(client):
    for model, said, weights in (("shy", "shy", {"shy": 1.0}), ("base", "base", {})):
        made = client.chat.completions.create(model=model, messages=asked("a rhyme"))
        assert made.choices[0].message.content == f"{said} user: a rhyme" and made.lorakern["adapters"] == weights


def test_the_last_message_of_the_user_is_what_adapters_are_found_by(client):
    said = [*asked("a rhyme"), {"role": "assistant", "content": "verse"}, *asked("broth stew"), *asked("soup broth")]
    said.append({"role": "assistant", "content": "rhyme rhyme sonnet"})
    made = client.chat.completions.create(model="auto", messages=said)
    assert next(iter(made.lorakern["adapters"])) == "cook"


def test_content_in_parts(client):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "rhyme"}]
    made = client.chat.completions.create(model="base", messages=[{"role": "user", "content": parts}])
    assert made.choices[0].message.content == "base user: a rhyme"


def test_chat_stream(client):
    usage = {"include_usage": True}
    got = list(
        client.chat.completions.create(model="auto", messages=asked("a rhyme"), stream=True, stream_options=usage)
    )
    assert [part.choices[0].delta.content for part in got[:-2]] == ["poet+cook", " user:", " a", " rhyme"]
    assert got[0].choices[0].delta.role == "assistant" and got[1].choices[0].delta.role is None
    assert [part.choices[0].finish_reason for part in got[:-1]] == [None] * 4 + ["stop"]
    assert got[-2].lorakern == {"adapters": {"poet": 0.5, "cook": 0.5}}
    assert got[-1].choices == [] and got[-1].usage.completion_tokens == 4
    assert len({part.id for part in got}) == 1


def test_completion(client):
    made = client.completions.create(model="poet", prompt="one two", temperature=0)
    assert made.choices[0].text == "poet one two" and made.usage.total_tokens == 5
    made = client.completions.create(model="poet", prompt=[7, 8], max_tokens=2)
    assert made.choices[0].text == "poet 7" and made.choices[0].finish_reason == "length"
    made = client.completions.create(model="poet", prompt=["one two three"], stop=["two"])
    assert made.choices[0].text == "poet one"
    made = client.completions.create(model="poet", prompt="one " * 30)
    assert made.usage.completion_tokens == 16


def test_completion_stream(client):
    got = list(client.completions.create(model="base", prompt="a b", stream=True, stop="b"))
    assert "".join(part.choices[0].text for part in got) == "base a" and got[-1].choices[0].finish_reason == "stop"


def test_stream_ends_as_clients_expect(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"model": "base", "prompt": "a b", "stream": True})
    connection.request("POST", "/v1/completions", body)
    response = connection.getresponse()
    assert response.headers["content-type"].startswith("text/event-stream")
    got, ended = events(response)
    assert ended and [part["choices"][0]["text"] for part in got] == ["base", " a", " b", ""]
    assert all("usage" not in part for part in got)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["auto", "base", "poet", "cook", "shy"]
    assert client.models.retrieve("poet").id == "poet"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="nobody") as error:
        client.chat.completions.create(model="nobody", messages=asked("a"))
    assert error.value.code == "model_not_found" and error.value.param == "model"


CHAT = {"model": "base", "messages": asked("a")}
REFUSED = {
    "temperature": CHAT | {"temperature": 0.7},
    "top_p": CHAT | {"top_p": 0.9},
    "n": CHAT | {"n": 2},
    "logprobs": CHAT | {"logprobs": True},
    "tools": CHAT | {"tools": [{"type": "function"}]},
    "response_format": CHAT | {"response_format": {"type": "json_object"}},
    "top_k": CHAT | {"top_k": 5},
    "max_tokens": CHAT | {"max_tokens": 0},
    "max_completion_tokens": CHAT | {"max_completion_tokens": "9"},
    "stop": CHAT | {"stop": ""},
    "stream": CHAT | {"stream": 1},
    "stream_options.more": CHAT | {"stream_options": {"more": 1}},
    "model": {"messages": asked("a")},
    "messages": CHAT | {"messages": []},
    "messages.0.role": CHAT | {"messages": [{"role": "tool", "content": "a"}]},
    "messages.0.content": CHAT | {"messages": [{"role": "user"}]},
    "prompt": CHAT | {"prompt": "a"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_with_the_field(server, field):
    status, answer = server.ask(**REFUSED[field])
    error = answer["error"]
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(field) and field.split(".")[0] in error["message"]


def test_neutral_values_pass(server):
    neutral = {"temperature": 0.0, "top_p": 1, "n": 1, "logprobs": False, "tools": [], "stop": None, "seed": 3}
    neutral |= {"presence_penalty": 0, "frequency_penalty": None, "response_format": {"type": "text"}, "user": "me"}
    assert server.ask(**CHAT, **neutral)[0] == 200


@pytest.mark.parametrize(
    "body, status, says",
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"[" * 100_000, 400, "JSON"),
        (b'{"model": "\\ud800", "messages": []}', 400, "surrogates"),
        (b"\xff\xfe", 400, "JSON"),
        (b" " * (9 << 20), 413, "bytes"),
        (json.dumps(CHAT | {"messages": [{"role": "system", "content": "a"}]}).encode(), 400, "role user"),
        (json.dumps(CHAT | {"messages": asked("a " * 3000)}).encode(), 400, "2048"),
        (json.dumps({"model": "base", "messages": asked("")}).encode(), 200, ""),
    ],
)
def test_bodies(server, body, status, says):
    got, answer = server.call("POST", "/v1/chat/completions", body)
    assert got == status and says in json.dumps(answer)


def test_several_prompts_and_an_empty_one(server):
    status, answer = server.ask("/v1/completions", model="base", prompt=["a", "b"])
    assert status == 400 and "2 prompts" in answer["error"]["message"]
    status, answer = server.ask("/v1/completions", model="base", prompt="")
    assert status == 400 and "empty" in answer["error"]["message"]


def test_no_route(server):
    for method, path, status in (("GET", "/nothing", 404), ("PUT", "/adapters", 405), ("GET", "/docs", 404)):
        got, answer = server.call(method, path)
        assert got == status and path in answer["error"]["message"]


def test_engine_that_fails(server, client, caplog):
    status, answer = server.ask("/v1/completions", model="base", prompt="a broken b")
    assert status == 500 and answer["error"]["type"] == "server_error" and "broke" not in answer["error"]["message"]
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(client.completions.create(model="base", prompt="a broken b", stream=True))
    assert server.ask("/v1/completions", model="base", prompt="a")[0] == 200


def test_engine_that_stopped(tmp_path):
    with serving(tmp_path) as server:
        server.engine.failure = RuntimeError("out of memory")
        for status, answer in (server.ask(**CHAT), server.call("GET", "/health")):
            assert status == 503 and "restart" in answer["error"]["message"] and "memory" not in str(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_end_of_the_server_cuts_short(tmp_path, stream):
    with serving(tmp_path) as server, ThreadPoolExecutor(1) as pool:
        fields = {"model": "base", "prompt": "slow", "max_tokens": 2000, "stream": stream}
        asked = pool.submit(server.ask, "/v1/completions", **fields)
        wait_until(lambda: server.engine.stats()["running"])
        server.engine.close()
        status, answer = asked.result()
        assert status == (200 if stream else 503) and "stopping" in str(answer) and "[DONE]" not in answer


def request_bytes(**fields):
    body = json.dumps(fields).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(tmp_path, stream):
    with serving(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request_bytes(model="base", prompt="slow", max_tokens=2000, stream=stream))
            wait_until(lambda: server.engine.stats()["tokens"] > 2)
        wait_until(lambda: server.engine.cancelled == 1 and server.engine.stats()["running"] == 0, 2)


def test_overload(tmp_path):
    with serving(tmp_path, max_requests=2) as server:
        slow = request_bytes(model="base", prompt="slow", max_tokens=2000)
        with (
            socket.create_connection(("127.0.0.1", server.port)) as one,
            socket.create_connection(("127.0.0.1", server.port)) as two,
        ):
            one.sendall(slow)
            two.sendall(slow)
            wait_until(lambda: server.engine.stats()["running"] == 2)
            status, answer = server.ask(**CHAT)
            assert status == 429 and answer["error"]["type"] == "rate_limit_error"
        wait_until(lambda: server.ask(**CHAT)[0] == 200)


def test_many_at_once(tmp_path):
    with serving(tmp_path, FakeEngine(0.001)) as server, ThreadPoolExecutor(32) as pool:
        asks = [pool.submit(server.ask, "/v1/completions", model="base", prompt=f"p {i}") for i in range(200)]
        assert [ask.result()[1]["choices"][0]["text"] for ask in asks] == [f"base p {i}" for i in range(200)]
        assert server.engine.stats()["requests"] == 200


def test_metrics_and_health(tmp_path):
    with serving(tmp_path) as server:
        server.upload(adapter_parts("poet"))
        server.upload(adapter_parts("poet"))
        server.ask("/v1/completions", model="poet", prompt="a b")
        server.call("GET", "/nothing/at/all")
        text = server.call("GET", "/metrics")[1]
        for line in (
            'lorakern_requests_total{route="/adapters",status="201"} 1.0',
            'lorakern_requests_total{route="/adapters",status="409"} 1.0',
            'lorakern_requests_total{route="/v1/completions",status="200"} 1.0',
            'lorakern_requests_total{route="other",status="404"} 1.0',
            'lorakern_uploads_refused_total{reason="exists"} 1.0',
            'lorakern_request_seconds_count{route="/v1/completions"} 1.0',
            "lorakern_generated_tokens_total 3.0",
            "lorakern_prompt_tokens_total 2.0",
            "lorakern_requests_running 0.0",
            "lorakern_adapters 1.0",
        ):
            assert line in text
        status, health = server.call("GET", "/health")
        assert status == 200 and {"status": "ok", "adapters": 1, "mode": "mixture"}.items() <= health.items()
