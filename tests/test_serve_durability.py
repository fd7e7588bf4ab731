"""What was acknowledged survives kill -9 at any moment, and what was not is there as a whole or not at all."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest
from serve_fake import FakeEngine
from serve_server import FORM, Server, adapter_files, adapter_parts, form, part, serving, wait_until

from lorakern.adapters import LoraAdapter
from lorakern.serve.record import Record
from lorakern.serve.store import AdapterStore

TESTS = Path(__file__).resolve().parent
TEXTS = ["rhyme verse", "ode"]


@contextmanager
def process(folder):
    """A server in a process of its own, which is killed at the end; also how many texts it encoded at its start."""
    python_path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, str(TESTS / "serve_fake.py"), str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": python_path}, text=True)
    try:
        address, encoded = child.stdout.readline().split()
        server = Server(int(address.rpartition(":")[2]), folder)
        server.encoded, server.kill = int(encoded), lambda: child.send_signal(signal.SIGKILL)
        yield server
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def test_kill_at_random_moments(tmp_path):
    """Three lives: clients upload, replace and delete until the server is killed under them."""
    # name to the ranks it may have: what was acknowledged, or was on its way when the server died
    may, rng = {}, random.Random(0)
    files = {rank: adapter_files(rank) for rank in (1, 2, 3)}

    def change(server, i, stop):
        name, local = f"adapter {i}", random.Random(i)
        while not stop.is_set():
            rank = local.choice((1, 2, 3, None))
            before = may.get(name, {None})
            may[name] = before | {rank}
            try:
                if rank is None:
                    status, _ = server.delete(name)
                    assert status in (204, 404)
                else:
                    parts = adapter_parts(name, TEXTS, "true", files[rank])
                    status, answer = server.upload(parts)
                    assert status == 201, answer
            except (OSError, HTTPException):
                return
            may[name] = {rank}

    for life in range(3):
        with process(tmp_path) as server:
            assert server.encoded == 0
            found = {a["name"]: a["ranks"][0] for a in server.call("GET", "/adapters")[1]["adapters"]}
            for name in may | found:
                assert found.get(name) in may.get(name, ()), (life, name, found.get(name), may.get(name))
                may[name] = {found.get(name)}
            assert not any(file.startswith("quarantine/") for file in server.files())
            assert len(server.files()) == 4 * len(found)
            stop = threading.Event()
            threads = [threading.Thread(target=change, args=(server, i, stop)) for i in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.3 + 0.3 * rng.random())
            server.kill()
            stop.set()
            for thread in threads:
                thread.join(10)
    with process(tmp_path) as server:
        found = {a["name"]: a["ranks"][0] for a in server.call("GET", "/adapters")[1]["adapters"]}
        assert all(found.get(name) in ranks for name, ranks in may.items())
        answered = server.ask("/v1/completions", model="auto", prompt="rhyme")[1]
        assert set(answered["lorakern"]["adapters"]) <= set(found)


def test_kill_in_the_middle_of_an_upload(tmp_path):
    with process(tmp_path) as server:
        assert server.upload(adapter_parts("kept", TEXTS))[0] == 201
        half = b"".join(adapter_parts("half"))[:-100]
        head = f"POST /adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['Content-Type']}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(half) + 200}\r\n\r\n".encode() + half)
            wait_until(lambda: any(file.endswith(".safetensors") for file in server.files() if "quarantine" in file))
            server.kill()
    assert any("quarantine/" in file for file in Server(0, tmp_path).files())
    with process(tmp_path) as server:
        assert server.names() == ["kept"] and server.encoded == 0
        assert not any("quarantine/" in file for file in server.files())


class Killed(BaseException):
    pass


def steps(monkeypatch, stop_at):
    """Let the store do so many steps on the disk, and then none."""
    done = []

    def counted(function):
        def step(*arguments, **options):
            done.append(function)
            if len(done) > stop_at:
                raise Killed
            return function(*arguments, **options)

        return step

    for where, name in ((os, "fsync"), (Path, "rename"), (Path, "unlink"), (Path, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(where, name, counted(getattr(where, name)))
    return done


def upload(store, name, rank):
    quarantine = store.new_quarantine()
    config, weights = adapter_files(rank)
    (quarantine / "adapter_config.json").write_bytes(config)
    (quarantine / "adapter_model.safetensors").write_bytes(weights)
    fields = {"created": 0, "bytes": len(weights), "sha256": "0" * 64}
    store.publish(quarantine, Record.of(name, LoraAdapter.load(quarantine), **fields))


def test_every_step_of_a_change_may_be_the_last(tmp_path, monkeypatch):
    """The store stopped before each of its steps on the disk: the next one finds the state before, or the one after."""
    changes = {
        "new": (lambda store: upload(store, "b", 2), [{"a": 1}, {"a": 1, "b": 2}]),
        "replaced": (lambda store: upload(store, "a", 2), [{"a": 1}, {"a": 2}]),
        "removed": (lambda store: store.remove("a"), [{"a": 1}, {}]),
        "updated": (lambda store: store.update(store.record("a")), [{"a": 1}]),
    }
    for change, (act, states) in changes.items():
        seen = []
        for stop_at in range(100):
            folder = tmp_path / f"{change} {stop_at}"
            store = AdapterStore(folder, pytest.fail)
            upload(store, "a", 1)
            with monkeypatch.context() as patch:
                done = steps(patch, stop_at)
                finished = False
                try:
                    act(store)
                    finished = True
                except Killed:
                    pass
            store.close()
            again = AdapterStore(folder, pytest.fail)
            found = {record.name: record.ranks[0] for record in again.records}
            assert found in states, (change, stop_at)
            assert len(Server(0, folder).files()) == 4 * len(found), (change, stop_at)
            again.close()
            seen.append(found)
            if finished:
                assert found == states[-1] and len(done) == stop_at > 2
                break
        # once there, a change stays
        assert [states.index(found) for found in seen] == sorted(states.index(found) for found in seen)


def test_restart_does_not_encode_again_unless_the_encoder_changed(tmp_path):
    with serving(tmp_path) as server:
        server.upload(adapter_parts("poet", TEXTS))
        server.upload(adapter_parts("cook", ["stew broth", "soup"]))
        found = server.engine.retriever.retrieve(["rhyme"], k=2)
    engine = FakeEngine()
    with serving(tmp_path, engine) as server:
        assert engine.retriever.encoder.encoded == 0 and server.names() == ["poet", "cook"]
        assert engine.retriever.retrieve(["rhyme"], k=2) == found
    for _ in range(2):
        engine = FakeEngine()
        engine.retriever.encoder.identity = "letters, second edition"
        with serving(tmp_path, engine):
            pass
    assert engine.retriever.encoder.encoded == 0
    engine = FakeEngine()
    engine.retriever.encoder.identity = None
    with serving(tmp_path, engine):
        assert engine.retriever.encoder.encoded == 4


def test_what_cannot_be_served_is_said_and_kept(tmp_path, caplog):
    with serving(tmp_path) as server:
        for name in ("good", "wide", "torn"):
            server.upload(adapter_parts(name))
    wide = adapter_files(modules={"other.proj": (6, 8)})
    for file, content in zip(("adapter_config.json", "adapter_model.safetensors"), wide, strict=True):
        next((tmp_path / "adapters").glob("*3")).joinpath(file).write_bytes(content)
    record = next((tmp_path / "adapters").glob("*5")) / "record.json"
    assert json.loads(record.read_text())["name"] == "torn"
    record.write_text('{"name": "../torn"}')
    with serving(tmp_path) as server:
        assert server.engine.names == ["good"] and server.names() == ["good", "wide"]
        assert server.call("GET", "/adapters/wide")[1]["served"] is False
        assert server.ask("/v1/completions", model="wide", prompt="a")[0] == 404
        assert server.delete("wide")[0] == 204
        assert record.exists()
    assert "wide" in caplog.text and "record.json" in caplog.text


def test_names_are_data(tmp_path):
    names = ["<img src=x onerror=alert(1)>", "日本語", "a b?c#d&e%2F", "'; DROP TABLE", "con", ".hidden", "x" * 255]
    with serving(tmp_path) as server:
        for name in names:
            assert server.upload(adapter_parts(name))[0] == 201
        assert server.names() == names
        for name in names:
            assert server.ask("/v1/completions", model=name, prompt="a")[1]["choices"][0]["text"] == f"{name} a"
    with serving(tmp_path) as server:
        assert server.names() == names
        assert all(path.name.isdecimal() for path in (tmp_path / "adapters").iterdir())
        assert all(server.delete(name)[0] == 204 for name in names)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    with serving(tmp_path) as server:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        parts = adapter_parts("poet")
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(error))
        status, answer = server.upload(parts)
        monkeypatch.undo()
        assert status == 507 and "disk is full" in answer["error"]["message"]
        assert server.files() == [] and server.names() == []
        assert server.upload([*adapter_parts("poet")[:3], part("texts", json.dumps(TEXTS))])[0] == 201
        assert server.call("POST", "/adapters", form(adapter_parts("poet")), FORM)[0] == 409
