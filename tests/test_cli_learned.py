"""`lorakern soups`, `iteris`, `lorahub`, `router`: what they write, say and refuse, on a small model in a directory."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from adapter_builders import WEIGHTS
from cli_adapters import lorakern, result

import lorakern as lk
from lorakern.commands.iteris import read_size
from lorakern.merge import iteris, lorahub, soups
from lorakern.mixture import Routers, train_router

tiny_models = pytest.importorskip("tiny_models")
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "big",
    "red",
    "dog",
    "run",
    "far",
    "away",
    "from",
    "home",
    "again",
    "today",
    "<end>",
]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="?", pad_token="<end>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model M, adapters A and B for it, C for another, and data."""
    folder = tmp_path_factory.mktemp("learned")
    model = tiny_models.llama()
    model.save_pretrained(folder / "M")
    tokenizer().save_pretrained(folder / "M")
    first, second, _ = tiny_models.three(model)
    for name, adapter in (("A", first), ("B", second)):
        lk.LoraAdapter(dict(adapter), base_model_name_or_path="my/base", task_type="CAUSAL_LM").save(folder / name)
    lk.LoraAdapter({"elsewhere": (torch.ones(2, 8), torch.ones(6, 2), 1.0)}).save(folder / "C")
    records = [{"prompt": "the cat", "answer": " sat on"}, {"text": "one big red dog"}, {"text": "run far away"}]
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (folder / "more.jsonl").write_text(json.dumps({"text": "home again today and the mat"}) + "\n")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    return folder


@pytest.fixture(autouse=True)
def inside(folder, tmp_path, monkeypatch):
    """Relative names of the inputs work; outputs go to a directory of the test."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def loaded():
    model = transformers.AutoModelForCausalLM.from_pretrained("M").eval()
    words = transformers.AutoTokenizer.from_pretrained("M")
    return model, [lk.LoraAdapter.load(name) for name in "AB"], words


def assert_same(out, adapter):
    written = lk.LoraAdapter.load(out)
    assert list(written) == list(adapter)
    for module, (A, B, scale) in adapter.items():
        assert torch.equal(written[module].A, A) and torch.equal(written[module].B, B)
        assert written[module].scale == pytest.approx(scale)


# what they compute


def test_soups_writes_what_learn_gives(capsys):
    line = "soups M A B --data few.jsonl -o OUT --lr 0.1 --epochs 4 --batch-size 2 --warmup 2 --init 3 --json"
    got = result(capsys, *line.split(), "--plot", "loss.png")
    model, adapters, words = loaded()
    soup = soups.learn(model, adapters, "few.jsonl", tokenizer=words, lr=0.1, epochs=4, batch_size=2, warmup=2, init=3)
    assert_same("OUT", soup.adapter())
    assert got["losses"] == list(soup.losses) and len(got["losses"]) == 8
    assert {module: torch.tensor(w).tolist() for module, w in got["weights"].items()} == {
        module: w.tolist() for module, w in soup.weights.items()
    }
    assert got["ranks"] == {module: f.rank for module, f in soup.merged.items()}
    assert got["bytes"] == (Path("OUT") / WEIGHTS).stat().st_size
    assert Path("loss.png").read_bytes()[1:4] == b"PNG"
    card = (Path("OUT") / "README.md").read_text()
    assert "LoRA Soups" in card and f"lorakern {line}" in card and "my/base" in card


def test_soups_writes_a_lower_rank_and_another_dtype(capsys):
    told = lorakern(
        capsys,
        *[
            "soups",
            "M",
            "A",
            "B",
            "--data",
            "few.jsonl",
            "-o",
            "OUT",
            "--rank",
            "2",
            "--parametrisation",
            "free",
            "--init",
            "1,1",
            "--dtype",
            "bfloat16",
        ],
    )
    adapter = lk.LoraAdapter.load("OUT")
    assert all(f.rank <= 2 and f.A.dtype == torch.bfloat16 for f in adapter.values())
    assert "1 steps, loss" in told and "OUT: 6 modules, rank 2" in told


def test_lorahub_writes_what_search_gives(capsys):
    got = result(
        capsys,
        *[
            "lorahub",
            "M",
            "A",
            "B",
            "--data",
            "few.jsonl",
            "-o",
            "OUT",
            "--budget",
            "9",
            "--combine",
            "cat",
            "--seed",
            "5",
            "--json",
        ],
    )
    model, adapters, words = loaded()
    hub = lorahub.search(model, adapters, "few.jsonl", tokenizer=words, budget=9, combine="cat", seed=5)
    assert_same("OUT", hub.adapter())
    assert (got["weights"], len(got["trace"])) == (list(hub.weights), 9)
    assert got["score"] == pytest.approx(hub.score, rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--regmean", "--alpha", "1e-4"]])
def test_iteris_writes_what_solve_gives(flags, capsys):
    sweeps = [] if flags else ["--iterations", "3", "--lambda-source", "none", "--coefficients", "1", "0.5"]
    line = "iteris M A B --data few.jsonl more.jsonl -o OUT --rank 4 --json --max-memory 1MB --plot conv.png"
    got = result(capsys, *line.split(), *flags, *sweeps)
    model, adapters, words = loaded()
    samples = ["few.jsonl", "more.jsonl"]
    if flags:
        solution = iteris.regmean(model, adapters, samples, alpha=1e-4, tokenizer=words)
    else:
        options = {"iterations": 3, "lambda_source": None, "coefficients": [1, 0.5], "tokenizer": words}
        solution = iteris.solve(model, adapters, samples, **options)
    adapter, energy = solution.adapter(4)
    assert_same("OUT", adapter)
    assert (got["energy"], got["objectives"]) == (energy, solution.objectives)
    assert got["method"] == ("regmean" if flags else "iteris") and len(got["objectives"]) == (1 if flags else 3)
    assert Path("conv.png").read_bytes()[1:4] == b"PNG"


def test_iteris_folds_into_a_model_that_loads(capsys):
    line = "iteris M A B --data few.jsonl more.jsonl -o OUT --fold --iterations 2"
    told = lorakern(capsys, *line.split())
    assert "objective by sweep: " in told and "OUT: the model with 6 layers updated" in told
    model, adapters, words = loaded()
    solution = iteris.solve(model, adapters, ["few.jsonl", "more.jsonl"], tokenizer=words, iterations=2)
    whole = transformers.AutoModelForCausalLM.from_pretrained("OUT")
    for name, weight in solution.fold(model).state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    assert transformers.AutoTokenizer.from_pretrained("OUT")("the cat")["input_ids"] == words("the cat")["input_ids"]
    before = (Path("OUT") / "config.json").read_bytes()
    assert "is not empty" in lorakern(capsys, *line.split(), status=2)
    lorakern(capsys, *line.split(), "--force")
    assert (Path("OUT") / "config.json").read_bytes() == before
    assert {path.name for path in Path().iterdir() if path.name.startswith(".")} == set()


def test_a_killed_iteris_goes_on_from_its_last_sweep(capsys):
    line = "iteris M A B --data few.jsonl more.jsonl --rank 4 --iterations 3"
    lorakern(capsys, *line.split(), "-o", "WHOLE")
    script = textwrap.dedent("""
        import os, signal, sys
        from lorakern import cli
        from lorakern.merge.iteris.state import StateFile
        save = StateFile.save
        def save_and_die(self, state):
            save(self, state)
            if state.sweeps == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        StateFile.save = save_and_die
        sys.exit(cli.main(sys.argv[1:]))
    """)
    words = [*line.split(), "-o", "OUT", "--state", "kept"]
    killed = subprocess.run([sys.executable, "-c", script, *words], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL and not Path("OUT").exists()
    lorakern(capsys, *words)
    assert_same("OUT", lk.LoraAdapter.load("WHOLE"))


def test_router_writes_what_train_router_gives(capsys):
    line = (
        "router M A B --data few.jsonl -o r.safetensors --steps 4 --batch-size 2 --rank 3 --warmup 1 --empty 2 --json"
    )
    got = result(capsys, *line.split(), "--plot", "loss.png")
    model, adapters, words = loaded()
    named = dict(zip("AB", adapters, strict=True))
    options = {"steps": 4, "batch_size": 2, "rank": 3, "warmup": 1, "empty": 2, "cutoff": 256}
    routers, losses = train_router(model, named, "few.jsonl", tokenizer=words, **options)
    written = Routers.load("r.safetensors")
    assert got["losses"] == losses and got["adapters"] == ["A", "B"]
    assert all(torch.equal(tensor, written.parameters()[name]) for name, tensor in routers.parameters().items())
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")


# what they refuse

REFUSED = {
    "soups M A C --data few.jsonl -o OUT": "elsewhere",
    "soups M A B --data empty.jsonl -o OUT": "data is empty",
    "soups M A B --data broken.jsonl -o OUT": "line 2 is not valid JSON",
    "soups M A B --data none.jsonl -o OUT": "--data none.jsonl is no file",
    "soups M A none --data few.jsonl -o OUT": "none",
    "soups nothing/here A B --data few.jsonl -o OUT": "MODEL 'nothing/here' cannot be loaded",
    "soups M A B --data few.jsonl -o A": "where the input A is",
    "soups M A B --data few.jsonl -o M": "exists and is not empty",
    "soups M A B --data few.jsonl -o OUT --init one": "--init must be numbers",
    "soups M A B --data few.jsonl -o OUT --lr -1": "lr must be",
    "soups M A B --data few.jsonl -o OUT --rank 0": "--rank must be",
    "soups M A B --data few.jsonl -o OUT --model-dtype int8": "--model-dtype must be one of",
    "soups M A B --data few.jsonl -o OUT --plot no/such/a.png": "--plot",
    "lorahub M A B --data few.jsonl -o OUT --optimizer adam": "must be one of evolution, one-plus-one, nevergrad",
    "lorahub M A B --data few.jsonl -o OUT --budget 0": "budget must be",
    "iteris M A B --data few.jsonl -o OUT --rank 4": "--data names 1 files for 2 adapters",
    "iteris M A B --data few.jsonl more.jsonl -o OUT": "--rank R",
    "iteris M A B --data few.jsonl more.jsonl -o OUT --rank 4 --fold": "--rank R",
    "iteris M A B --data few.jsonl empty.jsonl -o OUT --rank 4": "is empty",
    "iteris M A B --data few.jsonl more.jsonl -o OUT --rank 4 --max-memory 8": "max_memory = 8 is too little",
    "iteris M A B --data few.jsonl more.jsonl -o OUT --rank 4 --max-memory lots": "--max-memory must be bytes",
    "iteris M A B --data few.jsonl more.jsonl -o OUT --rank 4 --regmean --iterations 2": "--iterations does not go",
    "iteris M A B --data few.jsonl more.jsonl -o OUT --rank 4 --coefficients 1": "coefficients must be 2 numbers",
    "router M A B --data few.jsonl -o A": "--output must be a file",
    "router M A B --data none.jsonl -o OUT": "--data none.jsonl is no file",
    "router M A A --data few.jsonl -o OUT": "two have one name",
    "router M A B --data few.jsonl -o OUT --mode mixture": "learns nothing",
    "router M A B --data few.jsonl -o OUT --dropout 1": "dropout must be",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals_are_one_line_and_leave_nothing(line, capsys):
    assert REFUSED[line] in lorakern(capsys, *line.split(), status=2)
    assert not Path("OUT").exists()


def test_the_last_good_weights_are_kept_where_a_loss_is_not_finite(capsys, monkeypatch):
    calls = []
    usual = soups.loss_of

    def loss_of(model, batch):
        calls.append(batch)
        return usual(model, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(soups, "loss_of", loss_of)
    told = lorakern(
        capsys,
        *["soups", "M", "A", "B", "--data", "few.jsonl", "-o", "OUT", "--batch-size", "1", "--lr", "0.1"],
        status=2,
    )
    assert "loss is not finite at step 3 of 3" in told and "OUT.last-good holds them" in told
    assert not Path("OUT").exists() and len(lk.LoraAdapter.load("OUT.last-good")) == 6


def test_sizes_have_units():
    assert [read_size(text) for text in ("5", "5B", "2kB", "1.5 MB", "1gib")] == [5, 5, 2000, 1_500_000, 2**30]
    for text in ("", "GB", "-1GB", "1 XB", "0", "nan", "infGB"):
        with pytest.raises(lk.LorakernError, match="--max-memory must be bytes"):
            read_size(text)


def test_help_loads_neither_torch_nor_transformers():
    script = "import sys; from lorakern import cli; cli.main(['soups', '--help']); print('transformers' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("False\n") and "--parametrisation" in told.stdout
