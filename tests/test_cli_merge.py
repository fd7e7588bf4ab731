"""`lorakern merge`: what it writes, says and refuses, and what a kill leaves behind."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from adapter_builders import CONFIG, WEIGHTS, assert_same, small
from cli_adapters import adapter, adapter_files, kohya, lorakern, result, snapshot, three
from merging import ALL, assert_update, total

import lorakern as lk
from lorakern import cli
from lorakern.adapters import LoraAdapter
from lorakern.errors import LorakernError
from lorakern.merge import method, methods
from lorakern.merge.registry import _METHODS

ROOT = Path(__file__).resolve().parents[1]
EXACT = dict(rtol=0, atol=0)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return three(tmp_path)


def assert_is(out, expected):
    """The adapter in `out` has the bits of `expected`."""
    assert adapter_files(out)
    loaded = LoraAdapter.load(out)
    assert list(loaded) == list(expected)
    for module, (A, B, scale) in expected.items():
        assert torch.equal(loaded[module].A, A) and torch.equal(loaded[module].B, B)
        assert loaded[module].scale == pytest.approx(scale, rel=1e-15)


# what it computes


def test_the_command_line_of_the_issue(inputs, capsys):
    line = "merge A B C -o OUT --method ties --weights 0.5 0.3 0.2 --rank 2 --density 0.5"
    told = lorakern(capsys, *line.split())
    assert_is(Path("OUT"), lk.merge(inputs, "ties", weights=[0.5, 0.3, 0.2], rank=2, density=0.5))
    size = (Path("OUT") / WEIGHTS).stat().st_size
    assert told.strip() == f"OUT: ties of 3 adapters: 12 modules, rank 2, float32, {size / 1000:.1f} kB"


@pytest.mark.parametrize("name", ALL)
def test_every_method_is_that_of_python(name, inputs, capsys):
    options = [f"--set={key}={value}" for key, value in ALL[name].items()]
    lorakern(capsys, "merge", "A", "B", "C", "-o", "OUT", "-m", name, "--weights", "0.5,-0.25,2", *options)
    assert_is(Path("OUT"), lk.merge(inputs, name, weights=[0.5, -0.25, 2.0], **ALL[name]))


@pytest.mark.parametrize(
    "line, method, options",
    [
        ("", "cat", {}),
        ("--weights 1 -2 3", "cat", {"weights": [1.0, -2.0, 3.0]}),
        ("--weights 1 2 3 --normalize --missing skip", "cat", dict(weights=[1, 2, 3], normalize=True, missing="skip")),
        ("-m linear --rank 0.9", "linear", {"rank": 0.9}),
        ("-m svd --rank 3 --dtype bfloat16", "svd", {"rank": 3, "dtype": torch.bfloat16}),
        ("-m svd --dtype float64 --device cpu", "svd", {"dtype": torch.float64, "device": "cpu"}),
        ("-m dare_ties --seed 7 --density 0.3", "dare_ties", {"seed": 7, "density": 0.3}),
        ("-m ties --density 0.3 0.5 1", "ties", {"density": [0.3, 0.5, 1.0]}),
        ("-m ties --majority-sign frequency", "ties", {"majority_sign_method": "frequency"}),
        ("-m knots --set density=0.4 --set majority_sign_method=frequency", "knots", None),
    ],
)
def test_options(line, method, options, inputs, capsys):
    options = {"density": 0.4, "majority_sign_method": "frequency"} if options is None else options
    lorakern(capsys, "merge", "A", "B", "C", "-o", "OUT", *line.split())
    assert_is(Path("OUT"), lk.merge(inputs, method, **options))


def test_options_of_a_third_party_are_read_as_it_types_them(inputs, capsys):
    seen = {}

    @method("cli_typed")
    def typed(
        terms, rank, generator, *, share: float, count: int = 1, on: bool = False, word: str = "", maybe: int | None = 3
    ):
        seen.update(share=share, count=count, on=on, word=word, maybe=maybe)
        return terms[0].A, terms[0].B, 1.0

    try:
        line = ["merge", "A", "-o", "OUT", "-m", "cli_typed", "--set", "share=1", "--set", "count=2"]
        more = ["--set", "on=true", "--set", "word=3", "--set", "maybe=none"]
        lorakern(capsys, *line, *more)
        assert seen == {"share": 1, "count": 2, "on": True, "word": "3", "maybe": None}
        says = lorakern(capsys, *line[:-2], "--set", "count=x", "--force", status=2)
        assert "cli_typed: count must be an integer, got 'x'" in says
        says = lorakern(capsys, *line[:6], "--force", status=2)
        assert "cli_typed: option share must be given, it is a number" in says
    finally:
        del _METHODS["cli_typed"]


def test_a_density_for_each_adapter(inputs):
    """Each adapter keeps its own share; of a module that one lacks, the others keep theirs."""

    def same(left, right):
        return all(torch.equal(left[m].A, right[m].A) and torch.equal(left[m].B, right[m].B) for m in left)

    lacking = [m for m in inputs[0] if m not in inputs[1]]
    assert lacking
    for name in sorted(name for name in methods if "density" in methods[name].options):
        one, each = (lk.merge(inputs, name, density=density) for density in (0.5, [0.5, 0.1, 1.0]))
        assert same(lk.merge(inputs, name, density=[0.5] * 3), one) and not same(each, one)
        without = lk.merge([inputs[0], inputs[2]], name, density=[0.5, 1.0])
        assert same({m: each[m] for m in lacking}, without)
    densities, weights = [0.3, 0.6, 1.0], [0.5, 2.0, -1.0]
    merged = lk.merge(inputs, "magnitude_prune", density=densities, weights=weights, rank=99)
    alone = [lk.merge([x], "magnitude_prune", density=d, rank=99) for x, d in zip(inputs, densities, strict=True)]
    for module in merged:
        assert_update(merged[module], total(alone, weights, module), 1e-2)
    with pytest.raises(LorakernError, match=r"density must have 3 numbers, one for each adapter, got \[0.5\]"):
        lk.merge(inputs, "ties", density=[0.5])
    with pytest.raises(LorakernError, match=r"ties: density must be .* or a list with one for each adapter, got \[0.5"):
        lk.merge(inputs, "ties", density=[0.5, 2.0, 1.0])


def test_per_adapter_options_of_a_method_of_all_modules_are_refused():
    from lorakern.merge import Densities, register

    def function(modules, rank, generators, *, density: Densities = 1.0):
        return iter(())

    with pytest.raises(LorakernError, match="a method of all modules at once has no options per adapter"):
        register("cli_whole", function, whole=True)


def test_kohya_in_peft_out(inputs, capsys):
    path = kohya(Path.cwd())
    lorakern(capsys, "merge", path, path, "-o", "OUT", "--weights", "1", "0.5")
    merged, style = LoraAdapter.load("OUT"), LoraAdapter.load(path)
    assert list(merged) == list(style)
    assert all(merged[m].rank == 2 * style[m].rank for m in merged)
    for module in merged:
        assert_update(merged[module], total([style, style], [1.0, 0.5], module), 1e-6)


# what it says


def test_json_and_quiet(inputs, capsys):
    line = ("merge", "A", "B", "-o", "OUT", "-m", "svd", "--weights", "1", "0.5", "--rank", "2")
    found = result(capsys, *line)
    assert (found["output"], found["written"], found["method"], found["rank"]) == ("OUT", True, "svd", 2)
    assert found["bytes"] == (Path("OUT") / WEIGHTS).stat().st_size
    assert [module["rank"] for module in found["modules"]] == [2] * 12
    assert [(source["path"], source["weight"]) for source in found["inputs"]] == [("A", 1.0), ("B", 0.5)]
    assert [source["modules"] for source in found["inputs"]] == [12, 8]
    assert lorakern(capsys, *line, "--force", "--quiet") == ""


@pytest.mark.parametrize("name", ALL)
def test_a_dry_run_writes_nothing_and_bounds_what_would_come(name, inputs, capsys):
    for rank in (None, 2, 0.9):
        if (name in ("cat", "fedex") and rank) or ("density" in ALL[name] and rank == 0.9):
            continue
        line = ["merge", "A", "B", "C", "-o", "OUT", "-m", name, *([] if rank is None else ["--rank", str(rank)])]
        planned = result(capsys, *line, "--dry-run")
        assert planned["written"] is False and not Path("OUT").exists()
        told = lorakern(capsys, *line, "--dry-run")
        assert "model.layers.*.self_attn.q_proj" in told and "nothing was written" in told
        merged = lk.merge(inputs, name, rank=rank)
        assert [module["module"] for module in planned["modules"]] == list(merged)
        for module in planned["modules"]:
            A, B, _ = merged[module["module"]]
            assert A.shape[0] <= module["rank"] and module["dtype"] == str(A.dtype)[6:]
            assert (module["d_in"], module["d_out"]) == (A.shape[1], B.shape[0])
            assert module["rank"] == A.shape[0] or rank == 0.9
            assert module["bytes"] == module["rank"] * (A.shape[1] + B.shape[0]) * A.element_size()
            ranks = [source[module["module"]].rank if module["module"] in source else None for source in inputs]
            assert module["ranks"] == ranks
        assert planned["bytes"] == sum(module["bytes"] for module in planned["modules"])


def test_a_dry_run_finds_what_a_merge_would(inputs, capsys):
    poisoned = adapter(2, seed=5)
    poisoned["model.layers.3.mlp.down_proj"].B[0, 0] = torch.nan
    poisoned.save("NAN")
    says = lorakern(capsys, "merge", "A", "NAN", "-o", "OUT", "--dry-run", status=2)
    assert "lora_B of model.layers.3.mlp.down_proj has 1 values that are NaN" in says
    says = lorakern(capsys, "merge", "A", "B", "-o", "OUT", "--rank", "4", "--dry-run", status=2)
    assert "cat: rank must be None or at least the sum of the ranks, 5" in says


def test_the_card_says_what_went_in(inputs, capsys, monkeypatch):
    Path("odd `name` | x").mkdir()
    small().save("odd `name` | x")
    monkeypatch.chdir(Path.cwd())
    line = ["merge", "./A", "B/", "-o", "OUT", "-m", "ties", "--weights", "0.5", "0.25", "--density", "0.5"]
    lorakern(capsys, *line)
    card = (Path("OUT") / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "my/base",
        "library_name": "peft",
        "tags": ["lora", "merge", "lorakern"],
    }
    for name, path, weight in (("A", "./A", "0.5"), ("B", "B/", "0.25")):
        digest = hashlib.sha256((Path(name) / WEIGHTS).read_bytes()).hexdigest()
        assert f"| `{path}` | {weight} | `{digest}` |" in text
    assert "lorakern " + " ".join(line) in text and "| density | `0.5` |" in text
    assert f"lorakern {lk.__version__}, torch {torch.__version__}, Python " in text
    assert str(Path.cwd()) not in card
    lorakern(capsys, "merge", "odd `name` | x", "-o", "ODD")
    assert "| `` odd `name` \\| x `` | 1 |" in (Path("ODD") / "README.md").read_text()


@pytest.mark.parametrize("base", ["/models/base", "../base", "my base", 'a": b\n- x', None])
def test_a_base_model_that_is_no_id_of_the_hub_is_not_in_the_front_matter(base, tmp_path, capsys):
    adapter(2, base_model_name_or_path=base).save(tmp_path / "in")
    lorakern(capsys, "merge", tmp_path / "in", "-o", tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert "base_model" not in yaml.safe_load(front)
    assert LoraAdapter.load(tmp_path / "out").config.base_model_name_or_path == base


# what it refuses


def test_out_that_exists(inputs, capsys):
    Path("empty").mkdir()
    (Path("empty") / f".lorakern-{16 * 'a'}-data.tmp").touch()
    lorakern(capsys, "merge", "A", "B", "-o", "empty")
    assert adapter_files(Path("empty"))
    before = snapshot(Path("empty"))
    says = lorakern(capsys, "merge", "B", "C", "-o", "empty", status=2)
    assert "empty: --output exists and is not empty; give another directory, or --force" in says
    assert snapshot(Path("empty")) == before
    (Path("empty") / "notes.txt").write_text("kept")
    lorakern(capsys, "merge", "B", "C", "-o", "empty", "--force")
    (Path("empty") / "notes.txt").unlink()
    assert_is(Path("empty"), lk.merge(inputs[1:]))


def test_out_that_is_an_input_or_no_directory(inputs, capsys):
    Path("link").symlink_to("A")
    Path("file").touch()
    before = snapshot(Path("A"))
    for sources, out in (("A B", "A"), ("B A", "./A/"), ("A", "link"), ("link", "A"), (f"A/{WEIGHTS} B", "A")):
        says = lorakern(capsys, "merge", *sources.split(), "-o", out, "--force", status=2)
        assert "--output is where the input" in says and "give another directory" in says
    path = kohya(Path("C"))
    says = lorakern(capsys, "merge", path, "-o", "C", "--force", status=2)
    assert "--output is where the input" in says
    says = lorakern(capsys, "merge", "A", "-o", "file", "--force", status=2)
    assert "file: --output is a file" in says
    for bad in ("file/out", "x" * 5000):
        lorakern(capsys, "merge", "A", "-o", bad, status=2)
    assert snapshot(Path("A")) == before


BAD = {
    "-m tyes": "method must be one of cat, dare_linear, ",
    "-m ties --density 0": "ties: density must be a number above 0 and at most 1",
    "-m ties --density half": "ties: density must be a number above 0",
    "-m ties --density 0.5 0.5": "density must have 3 numbers, one for each adapter, got [0.5, 0.5]",
    "-m cat --density 0.5": "cat: there is no option 'density'; the options of this method are: none",
    "-m ties --set densty=1": "ties: there is no option 'densty'; the options of this method are: density: a",
    "-m ties --set density": "--set must be name=value, such as --set density=0.5, got 'density'",
    "-m ties --set density=1 --set density=1": "--set density is given twice",
    "-m ties --density 1 --set density=1": "--set density is given twice, or beside its own flag",
    "-m ties --majority-sign most": "ties: majority_sign_method must be 'total' or 'frequency', got 'most'",
    "--weights 1 2": "weights must be None or a list of 3 numbers, one per adapter, got [1.0, 2.0]",
    "--weights 1,x,2": "--weights must be numbers, such as --weights 0.5 0.3 0.2, got '1,x,2'",
    "--weights 1 nan 2": "weights must be None or a list of 3 numbers",
    "--weights 1 -1 0 --normalize": "sum to zero and cannot be normalized",
    "--rank 0": "--rank must be a positive integer, or a share of the energy above 0 and below 1, got '0'",
    "--rank 1.0": "--rank must be a positive integer",
    "--rank nan": "--rank must be a positive integer",
    "--rank 3": "model.layers.0.self_attn.q_proj: cat: rank must be None or at least the sum of the ranks, 6",
    "--dtype int8": "--dtype must be one of float16, bfloat16, float32, float64, got 'int8'",
    "--device toaster": "--device 'toaster' cannot be used",
    "--device meta": "--device 'meta' cannot be used",
    "--missing no": "missing must be one of zero, skip, error, got 'no'",
    "--missing error": "model.layers.0.mlp.up_proj: adapter 1 (B) lacks this module, which adapter 0 (A) has",
    "recipe.yaml": "recipe.yaml: a recipe names all adapters itself; give it alone",
    "other/base": "for the base model 'other/base', A for 'my/base'; adapters of different bases do not belong toge",
    "other/shape": "model.layers.0.self_attn.q_proj: d_in, d_out are (7, 11) in adapter 0 (A) and (5, 6) in adapter 3",
    "nowhere": "nowhere: no such file or directory",
}


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_told_in_one_line_and_leaves_out_alone(line, dry, inputs, capsys):
    adapter(1, seed=7, base_model_name_or_path="other/base").save("other/base")
    LoraAdapter({"model.layers.0.self_attn.q_proj": (torch.ones(1, 5), torch.ones(6, 1), 1.0)}).save("other/shape")
    Path("recipe.yaml").write_text("")
    small().save("OUT")
    before = snapshot(Path("OUT"))
    words = [*line.split(), *(["--dry-run"] if dry else [])]
    says = lorakern(capsys, "merge", "A", "B", "C", "-o", "OUT", "--force", *words, status=2)
    assert BAD[line] in says
    assert snapshot(Path("OUT")) == before


def test_base_models_that_are_one(inputs, capsys):
    adapter(1, seed=7, base_model_name_or_path="/copy/of/base").save("D")
    says = lorakern(capsys, "merge", "A", "D", "-o", "OUT", status=2)
    assert "--base-model says which one to write" in says
    lorakern(capsys, "merge", "A", "D", "-o", "OUT", "--base-model", "my/base")
    assert LoraAdapter.load("OUT").config.base_model_name_or_path == "my/base"


def test_nan_in_the_last_module_leaves_the_old_adapter(inputs, capsys):
    poisoned = adapter(2, seed=5)
    poisoned["model.layers.3.mlp.down_proj"].A[0, 0] = torch.inf
    poisoned.save("INF")
    small().save("OUT")
    before = snapshot(Path("OUT"))
    assert "lora_A of model.layers.3.mlp.down_proj" in lorakern(
        capsys, "merge", "A", "INF", "-o", "OUT", "--force", status=2
    )
    assert snapshot(Path("OUT")) == before


# as a program


def program(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return dict(args=[sys.executable, "-m", "lorakern.cli", *arguments], env=environment)


def test_as_a_program(inputs):
    for line, status, out, err in (
        ("merge A B C -o OUT --method ties --weights 0.5 0.3 0.2 --rank 16 --density 0.5", 0, "OUT: ties of 3", ""),
        ("merge A nowhere -o OUT2", 2, "", "lorakern: nowhere: no such file or directory"),
    ):
        done = subprocess.run(**program(*line.split()), capture_output=True, text=True, check=False)
        assert done.returncode == status and done.stdout.startswith(out) and done.stderr.startswith(err)
        assert done.stdout.count("\n") == bool(out) and done.stderr.count("\n") == bool(err)
    assert_is(Path("OUT"), lk.merge(inputs, "ties", weights=[0.5, 0.3, 0.2], rank=16, density=0.5))


def test_help_imports_nothing_of_the_commands():
    code = """if 1:
        import sys
        from lorakern.cli import main
        main(["--help"])
        heavy = {"yaml", "matplotlib", "transformers", "peft", "lorakern.commands", "rich.progress"}
        sys.exit(", ".join(heavy & set(sys.modules)) or 0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and all(name in done.stdout for name in ("merge", "resize", "check", "inspect"))


def state(folder, expected):
    """Which of the expected adapters is in `folder`, or None where a config is missing; anything else fails."""
    try:
        loaded = LoraAdapter.load(folder)
    except LorakernError as error:
        assert f"there is no {CONFIG} in it" in str(error)
        return None
    fill = float(loaded["layers.0.proj"].A[0, 0])
    assert_same(loaded, expected[fill])
    return fill


def test_killed_at_any_time_in_a_merge(tmp_path):
    """kill -9 while one merge after the other replaces OUT: the old adapter, one of the new ones, or none."""
    out, expected = tmp_path / "out", {}
    for fill in range(1, 9):
        small(float(fill)).save(tmp_path / str(fill))
        cli.main(["merge", str(tmp_path / str(fill)), "-o", str(out), "--force", "--quiet"])
        expected[float(fill)] = LoraAdapter.load(out)
        expected[float(fill)] = LoraAdapter({m: tuple(f) for m, f in expected[float(fill)].items()})
    seen, chance = set(), random.Random(0)
    for attempt in range(30):
        done, doing = os.pipe()
        child = os.fork()
        if not child:
            try:
                for turn in range(attempt, 10_000):
                    cli.main(["merge", str(tmp_path / str(1 + turn % 8)), "-o", str(out), "--force", "--quiet"])
                    os.write(doing, b".")
            finally:
                os._exit(1)
        os.close(doing)
        # on a busy machine nothing might happen in a time that is set before
        assert os.read(done, 1) == b"."
        time.sleep(chance.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        os.close(done)
        seen.add(state(out, expected))
    assert len(seen) > 2
    cli.main(["merge", str(tmp_path / "1"), "-o", str(out), "--force", "--quiet"])
    assert adapter_files(out) and state(out, expected) == 1.0


def test_a_killed_program_leaves_no_half_adapter(tmp_path):
    """kill -9 of the real command, at a random moment after it began to write."""
    for name, seed in (("a", 1), ("b", 2)):
        adapter(3, seed=seed).save(tmp_path / name)
    out, chance = tmp_path / "out", random.Random(1)
    line = ("merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(out), "-m", "svd", "--force", "--quiet")
    complete = 0
    for _ in range(5):
        running = subprocess.Popen(**program(*line))
        while running.poll() is None and not (out.is_dir() and any(out.glob(".lorakern-*"))):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        running.kill()
        running.wait()
        try:
            assert len(LoraAdapter.load(out)) == 12
            complete += 1
        except LorakernError as error:
            assert f"there is no {CONFIG}" in str(error)
    done = subprocess.run(**program(*line), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert adapter_files(out) and len(LoraAdapter.load(out)) == 12


MEMORY = """
    import sys, torch
    from pathlib import Path
    from lorakern.adapters import AdapterWriter
    from lorakern.cli import main

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def write(folder, count):
        with AdapterWriter(folder) as writer:
            for i in range(count):
                writer.add(f"layers.{i}.proj", (torch.randn(32, 6144), torch.randn(6144, 32), 1.0))

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for count in (2, 64):
        for name in ("a", "b"):
            write(folder / f"{name}{count}", count)
    names = lambda count: [str(folder / f"{name}{count}") for name in ("a", "b")]
    assert main(["merge", *names(2), "-o", str(folder / "out2"), "-q", *sys.argv[2:]]) == 0
    before = peak()
    assert main(["merge", *names(64), "-o", str(folder / "out64"), "-q", *sys.argv[2:]]) == 0
    size = sum((folder / name / "adapter_model.safetensors").stat().st_size for name in ("a64", "b64")) / 2**20
    print(size, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("options", [["-m", "cat"], ["-m", "svd", "--rank", "8"], ["--dry-run"]])
def test_peak_memory_is_that_of_a_few_modules(options, tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split()[-2:])
    assert size > 180 and grown < 30, done.stdout
