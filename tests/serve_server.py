"""A server in a thread, and a client that sends what it is told to, also what no library would."""

import contextlib
import http.client
import io
import json
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from adapter_builders import CONFIG, WEIGHTS, factors
from serve_fake import MODULES, FakeEngine, template

from lorakern.adapters import LoraAdapter

pytest.importorskip("fastapi", reason="needs the extra serve")
import uvicorn

from lorakern.serve import Settings, create_app
from lorakern.serve.run import bind

BOUNDARY = "b0undary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


class Server:
    """Where a server is, and its engine and folder."""

    def __init__(self, port, folder, engine=None):
        self.port, self.folder, self.engine = port, Path(folder), engine
        self.url = f"http://127.0.0.1:{port}"

    def call(self, method, path, body=None, headers=None, timeout=20):
        """(status, content): JSON where it is, else text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def ask(self, path="/v1/chat/completions", **fields):
        return self.call("POST", path, json.dumps(fields), {"Content-Type": "application/json"})

    def upload(self, parts, headers=None):
        return self.call("POST", "/adapters", form(parts), FORM | (headers or {}))

    def delete(self, name, headers=None):
        return self.call("DELETE", f"/adapters/{quote(name, safe='')}", headers=headers)

    def names(self):
        return [adapter["name"] for adapter in self.call("GET", "/adapters")[1]["adapters"]]

    def files(self):
        """All that the store has on the disk."""
        found = (path for part in ("adapters", "quarantine") for path in (self.folder / part).rglob("*"))
        return sorted(str(path.relative_to(self.folder)) for path in found)


@contextlib.contextmanager
def serving(folder, engine=None, chat=template, retriever=None, **settings):
    """A server of the fake engine, or of another one, in a thread of this process."""
    engine = engine or FakeEngine()
    app = create_app(engine, retriever or engine.retriever, folder, chat, Settings(**settings))
    listening = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Server(listening.getsockname()[1], folder, engine)
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def part(name, content, file_name=None, *headers):
    """One part of a form, as bytes."""
    content = content.encode() if isinstance(content, str) else content
    name = name if isinstance(name, bytes) else name.encode()
    lines = [b'Content-Disposition: form-data; name="%b"' % name]
    if file_name is not None:
        lines[0] += b'; filename="%b"' % (file_name if isinstance(file_name, bytes) else file_name.encode())
    return b"\r\n".join([b"--" + BOUNDARY.encode(), *lines, *headers, b"", content, b""])


def form(parts):
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def adapter_files(rank=2, seed=0, modules=MODULES):
    """(config, weights) of an adapter that fits the fake engine."""
    made = {module: factors(rank, d_in, d_out, 0.5, seed=seed) for module, (d_out, d_in) in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        LoraAdapter(made, base_model_name_or_path="tiny").save(folder)
        return (Path(folder) / CONFIG).read_bytes(), (Path(folder) / WEIGHTS).read_bytes()


def adapter_parts(name="poet", texts=None, replace=None, files=None, **options):
    """The parts of a good upload."""
    config, weights = files or adapter_files(**options)
    parts = [part("name", name), part("config", config, CONFIG), part("weights", weights, WEIGHTS)]
    parts += [part("texts", json.dumps(texts))] if texts is not None else []
    return parts + ([part("replace", replace)] if replace is not None else [])


def events(stream):
    """The JSON of a stream of events, and whether it ended as it should."""
    lines = [line[6:] for line in io.TextIOWrapper(stream) if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line.strip() != "[DONE]"], lines[-1].strip() == "[DONE]"
