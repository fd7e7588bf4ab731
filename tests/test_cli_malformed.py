"""Inputs that are no good LoRA, given to the commands: one line, status 2, soon, and OUT untouched."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapter_builders import small
from cli_adapters import lorakern, snapshot
from test_malformed_files import CASES

from lorakern import cli

ROOT = Path(__file__).resolve().parents[1]
# every kind of input is there; the two adapters of "mixed base models" are only wrong together
NAMES = [*list(CASES)[:: len(CASES) // 45], "mixed base models"]
EVERY_COMMAND = NAMES[::9]


def build(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    built = CASES[name](folder)
    paths = built if isinstance(built, list) else [built if isinstance(built, Path) else folder]
    return [str(path) for path in paths]


@pytest.fixture
def out(tmp_path):
    small().save(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("of old")
    small(2.0).save(tmp_path / "good")
    return tmp_path / "out"


def test_there_are_forty():
    assert len(set(NAMES)) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_merge_refuses_soon_and_out_is_untouched(name, tmp_path, out, capsys):
    paths = build(name, tmp_path)
    if any("\0" in path for path in paths):
        pytest.skip("no command line can say this")
    before = snapshot(out)
    for inputs in ([*paths, tmp_path / "good"], [tmp_path / "good", *paths]):
        start = time.monotonic()
        says = lorakern(capsys, "merge", *inputs, "-o", out, "--force", status=2)
        # for a hang: how long it takes is not tested here
        assert time.monotonic() - start < 10
        assert str(tmp_path) in says and "Traceback" not in says
        assert len(says) < 1500 + 4 * max(map(len, paths))
        assert snapshot(out) == before


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_the_other_commands_refuse_too(name, tmp_path, out, capsys):
    (path, *_) = build(name, tmp_path)
    before = snapshot(out)
    good = tmp_path / "good"
    lines = [["merge", path, good, "-o", out, "--force", "--dry-run"]]
    if "NaN" not in name and "inf" not in name and "mixed" not in name:
        lines += [["check", path, "--merged", good], ["check", good, "--merged", path]]
    if "mixed" not in name:
        lines += [["inspect", path], ["resize", path, "-o", out, "--rank", "1", "--force"]]
    else:
        lines = []
    for line in lines:
        lorakern(capsys, *line, status=2)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", NAMES[::15])
def test_as_a_program(name, tmp_path, out):
    paths = build(name, tmp_path)
    before = snapshot(out)
    program = [sys.executable, "-m", "lorakern.cli", "merge", *paths, str(tmp_path / "good"), "-o", str(out), "--force"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lorakern: ") and done.stderr.count("\n") == 1
    assert snapshot(out) == before


def test_a_file_name_that_is_no_text(tmp_path, capsys):
    name = (tmp_path / "a\udcff\x1b[2J").as_posix()
    says = lorakern(capsys, "merge", name, "-o", tmp_path / "out", status=2)
    assert "no such file" in says and "\\udcff" in says
    Path(name).mkdir()
    small().save(name)
    assert cli.main(["merge", name, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert "\\udcff" in (tmp_path / "out" / "README.md").read_text()
