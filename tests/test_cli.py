"""The lorakern command: its output, its exit status, and errors of one line."""

import json
import subprocess
import sys

import pytest

import lorakern as lk

pytest.importorskip("typer")
pytest.importorskip("rich")
from lorakern import cli, demo


def test_info_shows_everything_that_lk_info_knows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    known = lk.info()
    for name, reason in known["backends"].items():
        line = next(line for line in shown.splitlines() if f"backend {name} " in line)
        assert (reason or "available") in line
    assert known["isa"] is None or known["isa"]["current"] in shown
    for package, version in known["versions"].items():
        assert package in shown and (version or "not installed") in shown


def test_info_says_why_a_backend_is_missing_with_its_brackets(capsys, monkeypatch):
    known = lk.info() | {"isa": None}
    known["backends"] = {"triton": "run pip install lorakern[triton]"}
    monkeypatch.setattr(lk, "info", lambda: known)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "missing: run pip install lorakern[triton]" in shown
    assert "not built" in shown


def test_info_json_is_lk_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == lk.info()


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lk.__version__


@pytest.mark.parametrize("line", ["", "nope", "info --nope", "demo --rows 1", "demo --rows x"])
def test_bad_usage_exits_with_2(line, capsys):
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert "Usage: lorakern" in captured.err + captured.out


@pytest.mark.parametrize("equal, status", [(True, 0), (False, 1)])
def test_demo_takes_its_options_and_exits_with_1_where_rows_differ(equal, status, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run", lambda folder, **options: seen.update(options, folder=folder) or equal)
    arguments = ["--adapters", str(tmp_path), "--rows", "9", "--repeats", "2", "--json", "a.json", "--plot", "a.png"]
    assert cli.main(["demo", *arguments]) == status
    assert seen["folder"] == tmp_path
    assert (seen["rows"], seen["repeats"], seen["json_file"].name, seen["plot_file"].name) == (9, 2, "a.json", "a.png")


def test_lorakern_errors_are_one_line_on_stderr(tmp_path, capsys):
    assert cli.main(["demo", "--adapters", str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lorakern: demo: ") and captured.err.count("\n") == 1
    assert "nowhere holds no adapter" in captured.err and "--adapters DIR" in captured.err


@pytest.mark.parametrize("package, extra", [("peft", "demo"), ("matplotlib", "plot"), ("rich.table", "cli")])
def test_a_missing_package_is_named_with_its_extra(package, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    command = ["info"] if extra == "cli" else ["demo", "--adapters", str(tmp_path), "--plot", str(tmp_path / "a.png")]
    assert cli.main(command) == 2
    needs, install = f"this needs the package {package.partition('.')[0]}", f"pip install 'lorakern[{extra}]'"
    assert capsys.readouterr().err == f"lorakern: {needs}; run `{install}`\n"


def test_another_import_error_is_a_bug_and_shows_itself(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'lorakern.nope'", name="lorakern.nope")

    monkeypatch.setattr(lk, "info", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from lorakern.cli import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "lorakern: this needs the package typer; run `pip install 'lorakern[cli]'`\n"


def test_as_a_program():
    program = [sys.executable, "-m", "lorakern.cli", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, lk.__version__)
