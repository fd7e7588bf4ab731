"""Uploads over HTTP: the good ones, and over fifty that are refused with a reason and leave nothing behind."""

import io
import json
import pickle
import socket
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapter_builders import CONFIG, WEIGHTS, entry, factors, safetensors_bytes
from safetensors.torch import save
from serve_server import BOUNDARY, FORM, adapter_files, adapter_parts, form, part, serving, wait_until

from lorakern.errors import LorakernError

LIMIT = 64 << 10


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), max_weights=LIMIT, read_seconds=0.3) as server:
        yield server


CONFIG_BYTES, WEIGHTS_BYTES = adapter_files()
CASES = {}


def case(name, status, says, parts=None, body=None, **headers):
    """An upload of `parts`, or of a whole body, that is to be refused with this status, in these words."""
    assert name not in CASES
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    CASES[name] = (form(parts) if body is None else body, headers, status, says)


def named(name):
    return [part("name", name), *GOOD[1:]]


def weighted(content, file_name=WEIGHTS):
    return [*GOOD[:2], part("weights", content, file_name)]


def configured(content, file_name=CONFIG):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return [GOOD[0], part("config", content, file_name), GOOD[2]]


def changed(**fields):
    return configured(json.loads(CONFIG_BYTES) | fields)


def zipped():
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        archive.writestr("adapter_model.safetensors", WEIGHTS_BYTES)
    return made.getvalue()


def tarred():
    with tarfile.open(fileobj=(made := io.BytesIO()), mode="w:gz") as archive:
        info = tarfile.TarInfo("../../etc/evil")
        info.size = len(WEIGHTS_BYTES)
        archive.addfile(info, io.BytesIO(WEIGHTS_BYTES))
    return made.getvalue()


def torch_file():
    torch.save({"a": torch.ones(2)}, made := io.BytesIO())
    return made.getvalue()


class Evil:
    def __reduce__(self):
        return print, ("run",)


def tensors(**changes):
    """The weights of an adapter whose one module has these factors."""
    a, b, _ = factors(2, 8, 6, 0.5)
    key = "base_model.model.layers.0.proj.lora_{}.weight"
    return save({key.format(letter): value for letter, value in ({"A": a, "B": b} | changes).items()})


GOOD = adapter_parts("bad")
A_KEY = "base_model.model.layers.0.proj.lora_A.weight"

# names
for label, name in {"empty": "", "long": "x" * 256, "control": "a\nb", "zero": "a\0b", "escape": "\x1b[31m"}.items():
    case(f"name: {label}", 400, "printable", named(name))
for label, name in {
    "up": "../../etc/passwd",
    "dots": "a..b",
    "path": "a/b",
    "absolute": "/root",
    "back": "a\\b",
}.items():
    case(f"name: {label}", 400, "holds", named(name))
case("name: turned around", 400, "printable", named("abc\u202etxt"))
case("name: space before", 400, "space", named(" poet"))
case("name: dot", 400, "dot", named("."))
case("name: auto", 400, "stands for", named("auto"))
case("name: base", 400, "stands for", named("base"))
case("name: no UTF-8", 400, "UTF-8", named(b"\xff\xfe"))
case("name: too many bytes", 413, "1024", named("x" * 2000))
case("name: taken", 409, "taken", named("taken"))
case("name: missing", 400, "name is missing", GOOD[1:])
case("name: twice", 400, "twice", [GOOD[0], *GOOD])

# weights
case("weights: missing", 400, "weights is missing", GOOD[:2])
case("weights: twice", 400, "twice", [*GOOD, GOOD[2]])
case("weights: no file", 400, "no file", [*GOOD[:2], part("weights", WEIGHTS_BYTES)])
case("weights: empty", 422, "truncated", weighted(b""))
case("weights: pickle", 422, "safetensors", weighted(pickle.dumps(Evil())))
case("weights: named .bin", 400, "pickle", weighted(pickle.dumps(Evil()), "adapter_model.bin"))
case("weights: torch", 422, "truncated", weighted(torch_file()))
case("weights: zip", 422, "truncated", weighted(zipped()))
case("weights: tar", 422, "truncated", weighted(tarred()))
case("weights: cut", 422, "truncated", weighted(WEIGHTS_BYTES[:-1]))
case("weights: longer", 422, "damaged", weighted(WEIGHTS_BYTES + b"\0"))
case("weights: header of 2^63", 422, "truncated", weighted(safetensors_bytes(b"{}", length=2**63)))
case("weights: header no JSON", 422, "JSON", weighted(safetensors_bytes(b"hello")))
case("weights: no tensors", 422, "no tensors", weighted(safetensors_bytes({})))
case("weights: hole", 422, "gap", weighted(safetensors_bytes({A_KEY: entry([2, 8], [4, 68])}, bytes(68))))
case("weights: integers", 422, "dtype", weighted(tensors(A=torch.ones(2, 8, dtype=torch.int32))))
case("weights: NaN", 422, "NaN", weighted(tensors(B=torch.full((6, 2), torch.nan))))
case("weights: infinity", 422, "infinit", weighted(tensors(A=torch.full((2, 8), torch.inf))))
case("weights: too wide", 422, "does not fit", weighted(tensors(A=torch.ones(2, 9))))
case("weights: ranks differ", 422, "layers.0.proj", weighted(tensors(A=torch.ones(3, 8))))
case("weights: three dimensions", 422, "layers.0.proj", weighted(tensors(A=torch.ones(2, 8, 1))))
case("weights: another model's", 422, "does not fit", adapter_parts(modules={"other.proj": (6, 8)}))
case("weights: too large", 413, str(LIMIT), weighted(bytes(LIMIT + 1)))
case("weights: much too large", 413, str(LIMIT), weighted(bytes(8 << 20)))
case("weights: path", 400, "path", weighted(WEIGHTS_BYTES, "../../adapter_model.safetensors"))
case("weights: absolute path", 400, "path", weighted(WEIGHTS_BYTES, "/etc/cron.d/x.safetensors"))
case("weights: zero in the file name", 400, "path", weighted(WEIGHTS_BYTES, b"x.safetensors\0.safetensors"))
case("weights: other suffix", 400, "safetensors", weighted(WEIGHTS_BYTES, "adapter_model.zip"))

# config
case("config: missing", 400, "config is missing", [GOOD[0], GOOD[2]])
case("config: empty", 422, "JSON", configured(b""))
case("config: no JSON", 422, "JSON", configured(b"{'r': 2}"))
case("config: a list", 422, "object", configured([]))
case("config: duplicate key", 422, "twice", configured(b'{"r": 2, "r": 2}'))
case("config: deep", 422, "JSON", configured(b'{"a":' + b"[" * 100_000))
case("config: too large", 413, str(1 << 20), configured(b" " * ((1 << 20) + 1)))
case("config: rank as text", 422, "r must be", changed(r="2"))
case("config: rank of others", 422, "rank", changed(r=3))
case("config: alpha NaN", 422, "lora_alpha", changed(lora_alpha=float("nan")))
case("config: DoRA", 422, "use_dora", changed(use_dora=True))
case("config: LoHa", 422, "LOHA", changed(peft_type="LOHA"))
case("config: named .py", 400, ".json", configured(CONFIG_BYTES, "adapter_config.py"))

# texts and fields
case("texts: no JSON", 400, "JSON list", [*GOOD, part("texts", "hello")])
case("texts: an object", 400, "JSON list", [*GOOD, part("texts", "{}")])
case("texts: numbers", 400, "JSON list", [*GOOD, part("texts", "[1]")])
case("texts: none", 400, "leave the field out", [*GOOD, part("texts", "[]")])
case("texts: deep", 400, "JSON list", [*GOOD, part("texts", "[" * 100_000)])
case("texts: half a surrogate", 400, "JSON list", [*GOOD, part("texts", '["\\ud800"]')])
case("texts: too many", 400, "at most", [*GOOD, part("texts", json.dumps(["a"] * 1001))])
case("texts: too large", 413, str(1 << 20), [*GOOD, part("texts", b" " * ((1 << 20) + 1))])
case("replace: a word", 400, "true or false", [*GOOD, part("replace", "maybe")])
case("unknown field", 400, "unknown", [*GOOD, part("folder", "/root")])
case("field without a name", 400, "unknown", [*GOOD, part("", "x")])
case("base64", 400, "Encoding", [part("name", "YQ==", None, b"Content-Transfer-Encoding: base64"), *GOOD[1:]])

# the body
case("no closing boundary", 400, "closing boundary", body=b"".join(GOOD))
case("cut in the middle", 400, "closing boundary", body=form(GOOD)[:900])
case("nothing", 400, "closing boundary", body=b"")
case("no form", 400, "malformed", body=b"hello" * 100)
case("headers without end", 400, "malformed", body=f"--{BOUNDARY}\r\n".encode() + b"X: " + b"y" * 10_000)
case("many headers", 400, "malformed", [part("name", "x", None, *[b"X: y"] * 50), *GOOD[1:]])
case("long epilogue", 413, "together", body=form(GOOD) + bytes(4 << 20))
case("JSON", 415, "multipart", body=b"{}", Content_Type="application/json")
case("no boundary", 415, "boundary", GOOD, Content_Type="multipart/form-data")
case("another boundary", 400, "malformed", GOOD, Content_Type="multipart/form-data; boundary=other")
case("long boundary", 400, "Boundary", GOOD, Content_Type=f"multipart/form-data; boundary={'b' * 300}")


def settled(server):
    """The files of the store when no upload is under way."""
    wait_until(lambda: not any(file.startswith("quarantine/") for file in server.files()))
    return server.files()


def test_there_are_fifty():
    assert len(CASES) >= 50


@pytest.mark.parametrize("name", CASES)
def test_refused(server, name):
    body, headers, status, says = CASES[name]
    if "taken" not in server.names():
        assert server.upload(adapter_parts("taken"))[0] == 201
    before = settled(server)
    got, answer = server.call("POST", "/adapters", body, FORM | headers)
    assert got == status, answer
    assert says in answer["error"]["message"] and answer["error"]["code"]
    assert str(server.folder) not in answer["error"]["message"]
    assert settled(server) == before and server.names() == ["taken"] and server.engine.names == ["taken"]


def raw(server, head, body):
    """A request of these bytes, and the status of its answer, or None if there is none."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"\r\n".join([b"POST /adapters HTTP/1.1", b"Host: 127.0.0.1", *head, b"", body]))
        answer = connection.recv(4096)
        return int(answer.split()[1]) if answer else None


KIND = f"Content-Type: {FORM['Content-Type']}".encode()
LIES = {
    "too small": (400, [b"Content-Length: 100"]),
    "too large": (408, [b"Content-Length: 1000000"]),
    "negative": (400, [b"Content-Length: -5"]),
    "a word": (400, [b"Content-Length: many"]),
    "two": (400, [b"Content-Length: 10", b"Content-Length: 20"]),
    "chunks that are none": (400, [b"Transfer-Encoding: chunked"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_length_that_is_no_true(server, lie):
    status, head = LIES[lie]
    before = settled(server)
    assert raw(server, [KIND, *head], form(GOOD)) == status
    assert settled(server) == before


def test_a_body_without_length_is_bounded(server):
    """Chunks that never end: refused as soon as they are too many."""
    before = settled(server)
    head = [b"POST /adapters HTTP/1.1", b"Host: 127.0.0.1", KIND, b"Transfer-Encoding: chunked", b"", b""]
    chunk = b"".join([b"10000\r\n", bytes(1 << 16), b"\r\n"])
    start = b"".join(GOOD[:2]) + part("weights", b"", WEIGHTS)[:-2]
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"\r\n".join(head) + b"%x\r\n%b\r\n" % (len(start), start))
        for _ in range(LIMIT // (1 << 16) + 1):
            connection.sendall(chunk)
        assert b" 413 " in connection.recv(4096)
    assert settled(server) == before


def test_a_client_that_leaves_leaves_nothing(server):
    before = settled(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = [b"POST /adapters HTTP/1.1", b"Host: 127.0.0.1", KIND, b"Content-Length: 99999", b"", b""]
        connection.sendall(b"\r\n".join(head) + b"".join(GOOD[:2]))
        wait_until(lambda: server.files() != before)
    assert settled(server) == before


def test_upload_list_show_delete(tmp_path):
    with serving(tmp_path) as server:
        status, made = server.upload(adapter_parts("poet <b>", texts=["rhyme", "verse"], rank=3))
        assert status == 201
        expected = {"name": "poet <b>", "ranks": [3], "modules": 2, "base_model": "tiny", "texts": 2}
        assert expected.items() <= made.items() and made["bytes"] == len(adapter_files(rank=3)[1])
        assert len(made["sha256"]) == 64 and made["retrievable"]
        assert server.upload(adapter_parts("shy"))[1]["retrievable"] is False
        assert server.names() == server.engine.names == ["poet <b>", "shy"]
        assert server.call("GET", "/adapters/poet%20%3Cb%3E")[1] == made | {"served": True}
        assert server.delete("poet <b>") == (204, "")
        assert server.delete("poet <b>")[0] == server.call("GET", "/adapters/poet%20%3Cb%3E")[0] == 404
        assert server.names() == server.engine.names == ["shy"]
        assert len(server.files()) == 4


def test_replace(tmp_path):
    with serving(tmp_path) as server:
        assert server.upload(adapter_parts("poet"))[0] == 201
        assert server.upload(adapter_parts("poet"))[0] == 409
        status, made = server.upload(adapter_parts("poet", rank=5, replace="true"))
        assert status == 201 and made["ranks"] == [5] and server.names() == ["poet"]
        assert len(server.files()) == 4 and server.engine.names == ["poet"]


def test_a_request_finishes_with_an_adapter_that_is_deleted(tmp_path):
    with serving(tmp_path) as server:
        server.upload(adapter_parts("poet"))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.ask, "/v1/completions", model="poet", prompt="slow", max_tokens=20)
            wait_until(lambda: server.engine.stats()["running"])
            loaded = server.engine.adapters["poet"]
            assert server.delete("poet")[0] == 204 and server.files() == []
            assert asked.result()[1]["lorakern"]["adapters"] == {"poet": 1.0}
        # its files are gone, and still mapped
        assert all(factors.A.isfinite().all() for factors in loaded.values())


def test_uploads_at_once_are_bounded(tmp_path):
    head = [b"POST /adapters HTTP/1.1", b"Host: 127.0.0.1", KIND, b"Content-Length: 99999", b"", b""]
    first = socket.socket()
    with serving(tmp_path, max_uploads=1, read_seconds=0.5) as server, ThreadPoolExecutor(1) as pool, first:
        first.connect(("127.0.0.1", server.port))
        first.sendall(b"\r\n".join(head) + part("texts", b"")[:-2])
        wait_until(lambda: server.files() != [])
        waiting = pool.submit(server.upload, adapter_parts("poet"))
        while not waiting.done():
            first.sendall(b"x")
            time.sleep(0.1)
        status, answer = waiting.result()
        assert status == 429 and "uploads" in answer["error"]["message"]
        waiting = pool.submit(server.upload, adapter_parts("poet"))
        time.sleep(0.1)
        first.close()
        assert waiting.result()[0] == 201


def test_another_server_on_the_same_folder_is_refused(tmp_path):
    with serving(tmp_path), pytest.raises(LorakernError, match="another server"), serving(tmp_path):
        pass
    with serving(tmp_path) as server:
        assert server.names() == []
