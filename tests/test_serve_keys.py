"""Who may change a server: keys, other sites' pages, hosts, and the start of one that everybody could change."""

import sys

import pytest
from serve_server import adapter_parts, serving

from lorakern.cli import main
from lorakern.errors import LorakernError
from lorakern.serve.guards import check_start, is_loopback

KEY = "s3cret"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), api_key=KEY) as server:
        yield server


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret2", f"Basic {KEY}", "ü"]
)
def test_wrong_keys(guarded, given):
    headers = {} if given is None else {"Authorization": given}
    for status, answer in (guarded.upload(adapter_parts(), headers), guarded.delete("poet", headers)):
        assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert guarded.names() == [] and guarded.files() == []


def test_right_key(guarded):
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {KEY}"}
        assert guarded.upload(adapter_parts("poet"), headers)[0] == 201
        assert guarded.delete("poet", headers)[0] == 204


def test_no_key_is_needed_to_ask(guarded):
    assert guarded.ask("/v1/completions", model="base", prompt="a")[0] == 200
    assert guarded.call("GET", "/adapters")[0] == 200
    guarded.upload(adapter_parts())
    assert 'lorakern_uploads_refused_total{reason="no_key"}' in guarded.call("GET", "/metrics")[1]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store")) as server:
        yield server


def test_pages_of_other_sites_change_nothing(local):
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
        assert local.upload(adapter_parts(), {"Origin": origin})[0] == 403
        assert local.delete("poet", {"Origin": origin})[0] == 403
    assert local.upload(adapter_parts("own"), {"Origin": local.url})[0] == 201


def test_host_names_that_mean_this_machine(local):
    for host, status in (("evil.example", 403), ("evil.example:80", 403), ("localhost:1", 200), ("[::1]:1", 200)):
        assert local.call("GET", "/adapters", headers={"Host": host})[0] == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_start_without_a_key_beyond_this_machine(host):
    assert not is_loopback(host)
    with pytest.raises(LorakernError, match="LORAKERN_API_KEY"):
        check_start(host, None)
    check_start(host, KEY)


@pytest.mark.parametrize("key", ["", " ", "a\nb", "schlüssel", " a"])
def test_keys_that_no_header_can_carry(key):
    with pytest.raises(LorakernError, match="--api-key"):
        check_start("127.0.0.1", key)


def test_command_refuses_before_it_loads_a_model(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("LORAKERN_API_KEY", raising=False)
    assert main(["serve", "--adapters", str(tmp_path / "a"), "--host", "0.0.0.0"]) == 2
    assert "LORAKERN_API_KEY" in capsys.readouterr().err and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert main(["serve", "--adapters", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["serve", "--adapters", str(tmp_path / "a"), "--dtype", "int8"]) == 2
    assert "--dtype" in capsys.readouterr().err


def test_command_names_the_extra(capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("lorakern.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--adapters", str(tmp_path)]) == 2
    assert "lorakern[serve]" in capsys.readouterr().err
