"""The serving benchmark without engines: workload, figures, checks, turns, files and pages. No time is asserted."""

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks.serving import __main__ as command
from benchmarks.serving import (
    adapters,
    checks,
    figures,
    page,
    records,
    report,
    session,
    turns,
    workers,
    workload,
)
from benchmarks.serving.workers import OURS, PLAIN, THEIRS
from benchmarks.serving.workload import Cell
from lorakern import LoraAdapter
from lorakern.errors import LorakernError

CONFIG = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_hidden_layers": 2,
}


def run_of(seconds, repetitions=3):
    """The run of a contender whose requests take `seconds` to the first of 4 tokens, and as much for the others."""
    times = [[seconds, *(seconds * (1 + i / 3) for i in (1, 2, 3))]] * 16
    measured = [figures.figures(times, 1600) for _ in range(repetitions)]
    return {"repetitions": measured, "median": figures.medians(measured), "same_tokens": True}


def record_of(cell=None, plain=1.0, theirs=50.0, ours=1.1):
    cell = cell or Cell("prefill", 4)
    asked = workload.requests(cell, 1000)
    runs = {PLAIN: run_of(plain), THEIRS: run_of(theirs, 1) if theirs else {"note": "left out"}, OURS: run_of(ours)}
    return {
        "name": cell.name,
        "cell": vars(cell),
        "requests": 16,
        "prompt_tokens": 1600,
        "new_tokens": 64,
        "least": workload.least(asked, (64, 8), 1000),
        "read_bandwidth": 30e9,
        "mm_flops": 300e9,
        "runs": runs,
        "agreement": {"first": 1.0, "until_differing": 0.9},
    }


def results_of(*made):
    engines = {
        name: {"mode": "NONE" if name == THEIRS else "X", "wrapper": None, "threads": 2, "start_seconds": 9.0}
        for name in workers.CONTENDERS
    }
    machine = {
        "cpu": "some CPU",
        "cores": 2,
        "threads": {"torch": 2},
        "cache_bytes": 32 << 20,
        "isa": None,
        "devices": ["cpu"],
        "device": "cpu",
        "system": "Linux",
        "versions": {"vllm": "0.32.0"},
    }
    floors = {"read_bandwidth": 30e9, "mm_flops": {"bfloat16": 300e9}, "fma_flops": {}}
    settings = {"model": "a model", "adapters": 16, "ranks": [64, 8], "repeats": 3, "engine": {}, "lora": {}}
    check = {"effect": 1.0, "difference": 0.05, "error": 0.05, "worst": 0.2, "first": 1.0, "until_differing": 0.9}
    busy = {"idle_engines": 0.03, "elsewhere": 0.1}
    return records.Results(
        machine, settings, floors, engines, check, busy, floors, seconds=60.0, records={r["name"]: r for r in made}
    )


def test_cells_are_those_of_the_issue():
    names = [cell.name for cell in workload.CELLS]
    assert len(names) == len(set(names)) == 10
    assert {cell.adapters for cell in workload.CELLS} == {1, 4, 16}
    assert set(workload.QUICK) <= set(workload.CELLS)
    assert [cell.name for cell in workload.select("decode-4ad")] == ["decode-4ad-uniform", "decode-4ad-zipf"]


@pytest.mark.parametrize("cell", workload.CELLS, ids=lambda cell: cell.name)
def test_requests_are_the_same_at_every_call_and_fit_the_engine(cell):
    asked = workload.requests(cell, 49152)
    torch.manual_seed(7)
    assert asked == workload.requests(cell, 49152)
    shortest, longest, new = workload.LENGTHS[cell.kind]
    assert all(shortest <= len(request.prompt) <= longest and request.new == new for request in asked)
    assert all(0 <= request.adapter < cell.adapters for request in asked)
    assert len(asked) == workers.ENGINE["max_num_seqs"]
    # All prompts in the first step: a request that waits for a second one would be timed as slow.
    assert sum(len(request.prompt) for request in asked) <= workers.ENGINE["max_num_batched_tokens"]


def test_cells_of_a_kind_have_the_same_prompts():
    one, other = (workload.requests(Cell("decode", n, "zipf"), 500) for n in (4, 16))
    assert [request.prompt for request in one] == [request.prompt for request in other]
    assert len({request.adapter for request in one}) < len({request.adapter for request in other})
    assert all(request.adapter is None for request in workload.without_adapters(one))


def test_the_sample_asks_every_adapter():
    assert sorted(request.adapter for request in workload.sample(500)) == list(range(workload.ADAPTERS))


def test_least_counts_each_adapter_once_and_every_prompt():
    asked = [workload.Request([1] * 10, 0, 4), workload.Request([1] * 30, 1, 4), workload.Request([1] * 5, 0, 4)]
    least = workload.least(asked, (8, 2), 100)
    assert least == {
        "distinct": 2,
        "ranks": [8, 2],
        "step_bytes": 2 * 100 * (8 + 2),
        "prompt_operations": 2 * 100 * (15 * 8 + 30 * 2),
    }


def test_adapters_are_peft_adapters_of_the_ranks(tmp_path):
    adapters.write(tmp_path, CONFIG, (4, 2))
    folders = adapters.paths(tmp_path)
    assert len(folders) == workload.ADAPTERS
    loaded = [LoraAdapter.load(folder) for folder in folders[:3]]
    for adapter, rank in zip(loaded, (4, 2, 4), strict=True):
        elements = sum(adapter[name].A.shape[1] + adapter[name].B.shape[0] for name in adapter)
        assert elements == adapters.elements_of_a_rank(CONFIG)
        assert {adapter[name].A.shape[0] for name in adapter} == {rank}
    name = next(iter(loaded[0]))
    assert not torch.equal(loaded[0][name].A, loaded[2][name].A)


def test_figures_of_a_repetition():
    found = figures.figures([[1.0, 1.5, 2.0], [2.0, 3.0, 4.0]], 14)
    assert found["seconds"] == 4.0 and found["tokens_s"] == 5.0 and found["generated_s"] == 1.5
    assert (found["first_mean"], found["first_p50"], found["first_p95"]) == (1.5, 1.0, 2.0)
    assert (found["token_mean"], found["token_p50"], found["token_p95"]) == (0.75, 0.5, 1.0)
    assert figures.medians([{"a": 1, "b": 9}, {"a": 5, "b": 7}, {"a": 3, "b": 8}]) == {"a": 3, "b": 8}


def test_ratios_and_verdicts():
    record = record_of(plain=1.0, theirs=20.0, ours=1.25)
    assert figures.ratio(record, PLAIN) == pytest.approx(0.8)
    words = [(target.other, word) for target, _, word in figures.verdicts(record)]
    assert words == [(PLAIN, "falls short"), (THEIRS, "falls short")]
    words = [word for _, _, word in figures.verdicts(record_of(ours=1.1, theirs=50))]
    assert words == ["met", "met"]
    decode = record_of(Cell("decode", 4), theirs=None)
    assert [word for _, _, word in figures.verdicts(decode)] == ["met"]
    assert figures.verdicts(record_of(theirs=None))[1][2] == "not measured"


def test_extra_is_measured_beside_its_floor():
    record = record_of(plain=1.0, ours=1.3)
    found = figures.extra(record)
    least = record["least"]
    assert found.step == pytest.approx(0.1) and found.first == pytest.approx(0.3)
    assert found.step_floor == least["step_bytes"] / 30e9
    assert found.first_floor == max(found.step_floor, least["prompt_operations"] / 300e9)
    assert found.best_ratio == pytest.approx(2 / (2 + found.first_floor + 3 * found.step_floor))
    record["runs"][PLAIN] = {"note": "left out"}
    assert figures.extra(record).step is None and figures.extra(record).best_ratio is None


def test_turns_alternate_and_the_slow_one_serves_once():
    served = []
    answers = session.take_turns([PLAIN, THEIRS, OURS], lambda name: served.append(name) or {"n": len(served)}, 3)
    assert served == [PLAIN, OURS, PLAIN, OURS, OURS, PLAIN, THEIRS, PLAIN, OURS]
    assert {name: len(of) for name, of in answers.items()} == {PLAIN: 3, THEIRS: 1, OURS: 3}
    assert answers[PLAIN][0] == {"n": 3}, "the first one is not timed"


def test_the_answers_are_compared_by_what_lora_changes():
    base = torch.zeros(16, 8)
    lora = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    tokens = [[1, 2, 3, 4]] * 16

    def answers(ours):
        scores = {PLAIN: base, THEIRS: lora, OURS: ours}
        return {name: {"scores": of.tolist(), "tokens": tokens} for name, of in scores.items()}

    found = checks.compare(answers(lora + 0.01))
    assert found["difference"] == pytest.approx(0.01) and found["worst"] < checks.MAX_ERROR
    assert found["first"] == found["until_differing"] == 1.0
    assert checks.compare(answers(base))["error"] == pytest.approx(1.0), "no adapter at all"
    swapped = checks.compare(answers(torch.cat([lora[1:2], lora[:1], lora[2:]])))
    assert swapped["worst"] > checks.MAX_ERROR > swapped["error"], "two of 16 requests have each other's adapters"
    alone = checks.compare({name: of for name, of in answers(lora).items() if name != THEIRS})
    assert set(alone) == {"effect"}


class Engine:
    """Stands in for a worker."""

    def __init__(self, name, scores, slots):
        self.contender, self.scores = workers.CONTENDERS[name], scores
        self.slots = slots if self.contender.lora else None

    def serve(self, asked, score=()):
        return {"scores": self.scores.tolist(), "tokens": [[1] * request.new for request in asked], "slots": self.slots}


def engines(ours, slots=range(1, 17)):
    lora = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    scores = {PLAIN: torch.zeros(16, 8), THEIRS: lora, OURS: lora if ours is None else ours}
    return {name: Engine(name, of, list(slots)) for name, of in scores.items()}


def test_nothing_is_timed_after_wrong_answers():
    assert checks.warm_up(engines(None), 500)["worst"] == 0
    with pytest.raises(LorakernError, match="nothing is timed"):
        checks.warm_up(engines(torch.zeros(16, 8)), 500)
    with pytest.raises(LorakernError, match="nothing is timed"):
        checks.warm_up(engines(torch.full((16, 8), math.nan)), 500)
    partly = engines(None)[OURS].scores.clone()
    partly[5] = math.nan
    with pytest.raises(LorakernError, match="nothing is timed"):
        checks.warm_up(engines(partly), 500)
    with pytest.raises(LorakernError, match="slots"):
        checks.warm_up(engines(None, slots=range(1, 16)), 500)


def test_an_engine_must_run_the_kernels_of_its_name():
    checks.started(PLAIN, {"wrapper": None})
    checks.started(OURS, {"wrapper": "lorakern.integrations.vllm.wrapper"})
    for name, wrapper in ((OURS, "vllm.lora.punica_wrapper.punica_cpu"), (THEIRS, None), (PLAIN, "lorakern.x")):
        with pytest.raises(LorakernError, match="runs the LoRA kernels of"):
            checks.started(name, {"wrapper": wrapper})


def test_sleeping_engines_are_watched():
    class Sleeper:
        def __init__(self):
            self.used = 0.0

        def cpu_seconds(self):
            return self.used

        def serve(self, asked):
            other.used += 0.5
            return {}

    one, other = Sleeper(), Sleeper()
    watched = turns.Turns({"one": one, "other": other})
    watched.serve("one", [])
    assert watched.asleep == 0.5 and watched.busy()["idle_engines"] > 0
    assert turns.machine_cpu_seconds() >= 0


def test_files_round_trip_and_bad_ones_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    results = results_of(record_of())
    records.write(path, results)
    assert vars(records.read(path)) == json.loads(json.dumps(vars(results)))
    for content in ("", "[]", "{}", '{"schema": "other"}', "no JSON"):
        path.write_text(content)
        with pytest.raises(LorakernError, match="--from"):
            records.read(path)
    with pytest.raises(LorakernError, match="cannot be read"):
        records.read(tmp_path / "missing")


def test_page_shows_every_cell_contender_and_verdict(tmp_path):
    pytest.importorskip("matplotlib")
    results = results_of(record_of(), record_of(Cell("decode", 16, "zipf"), theirs=None, ours=2.0))
    (tmp_path / "serving_notes.md").write_text("## Why\n\nBecause.\n")
    text = page.write(tmp_path, results).read_text()
    assert (tmp_path / "serving.png").stat().st_size > 10_000
    assert records.read(tmp_path / "serving.jsonl").records.keys() == results.records.keys()
    for wanted in ("prefill-4ad-uniform", "decode-16ad-zipf", *workers.CONTENDERS, "**met**", "**falls short**"):
        assert wanted in text
    assert "eager" in text and "left out" in text and "0.909" in text and "Because." in text
    assert all(line.count("|") == text.splitlines()[i - 1].count("|") for i, line in enumerate(text.splitlines())
               if line.startswith("|") and text.splitlines()[i - 1].startswith("|"))  # fmt: skip


def test_terminal_output(capsys, monkeypatch):
    results = results_of(record_of(), record_of(Cell("decode", 1), theirs=None))
    report.show(results)
    assert "decode-1ad" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.show(results)
    out = capsys.readouterr().out
    assert "prefill-4ad-uniform" in out and "0.85: met" in out and "cores busy" in out
    assert "NOT A QUIET" not in out
    results.busy["elsewhere"] = 1.0
    assert "NOT A QUIET" in report.busy_line(results)
    lines = "\n".join(report.cell_lines(results.records["decode-1ad"]))
    assert "left out" in lines and "LoRA adds" in lines


def test_command_line(capsys, tmp_path):
    assert command.main(["--list", "--quick"]) == 0
    assert capsys.readouterr().out.split() == [cell.name for cell in workload.QUICK]
    for arguments in (["--only", "nothing"], ["--ranks", "0"], ["--ranks", "128"], ["--repeats", "0"],
                      ["--json", str(tmp_path / "no" / "file")], ["--from", str(tmp_path / "none")]):  # fmt: skip
        assert command.main(arguments) == 2, arguments
    path = tmp_path / "run.jsonl"
    records.write(path, results_of(record_of()))
    assert command.main(["--from", str(path), "--json", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_vllm_is_not_imported_where_it_is_not_served():
    code = "import sys, benchmarks.serving.__main__, benchmarks.serving.worker; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=workers.ROOT)
