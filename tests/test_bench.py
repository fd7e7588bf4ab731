"""The benchmark harness: registry, runner, files, targets and command line. No time is asserted."""

import copy
import itertools
import json
import sys

import pytest
import torch

import lorakern as lk
from benchmarks import __main__ as command
from benchmarks import (
    cases,  # noqa: F401
    contenders,
    floors,
    inputs,
    plots,
    records,
    registry,
    report,
    results,
    rivals,
    runner,
    session,
    targets,
)
from benchmarks.registry import Case, Target
from benchmarks.timing import Effort, in_turns, summary

ALL = registry.select()
ON_A_GPU = registry.select(device="cuda")
TINY = Case(6, 3, ranks=(2, 4), d_in=24, d_outs=(16,), dtype="float32")
ONCE = Effort(0.0, 3, 3)
FLOORS = {
    "read_bandwidth": 30e9,
    "mm_flops": {"float32": 100e9, "bfloat16": 200e9},
    "fma_flops": {"avx512 fma": 200e9},
}


class Probe:
    """Stands in for the read of a large buffer."""

    device, kind, bytes = "cpu", "read", 1 << 20

    def __call__(self):
        pass


def measured(case, **options):
    return runner.measure(case, FLOORS, Probe(), ONCE, **options)


def made_up(seconds=1e-3, rivals=(), case=None, bandwidth=30e9, companion=None, kind="read"):
    """A record as `runner.measure` makes it, of round numbers."""
    case = case or registry.SUITES["decode"][0]
    run = summary([seconds] * 3, 1) | {
        "error": 1e-3,
        "gb_s": 1.0,
        "gflop_s": 1.0,
        "of_floor": 0.5,
        "ours": True,
        "ratio": 1.0,
    }
    runs = {"lorakern": run}
    for name, ratio in dict(rivals).items():
        runs[name] = run | summary([seconds * ratio] * 3, 1) | {"ours": False, "ratio": ratio}
    if companion:
        runs["companion"] = summary([companion] * 3, 1) | {
            "companion": "x",
            "ours": False,
            "ratio": companion / seconds,
        }
    floor = {
        "bytes": 24_000_000,
        "operations": 10**8,
        f"{kind}_bandwidth": bandwidth,
        "mm_flops": 2e11,
        "seconds": 8e-4,
        "bound": "bytes",
    }
    record = {"name": case.name, "suites": registry.suites_of(case), "case": vars(case), "rows_checked": case.tokens}
    return record | {"copies": 1, "floor": floor, "runs": runs}


def made_up_run(*made):
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "threads": {"torch": 2},
        "cache_bytes": 32 << 20,
        "isa": None,
        "devices": [],
        "system": "an OS",
        "versions": {"torch": "2"},
        "device": "cpu",
    }
    return records.Results(machine, FLOORS, FLOORS, records={record["name"]: record for record in made})


def test_names_are_unique_and_tell_every_field():
    everything = {*ALL, *ON_A_GPU}
    assert len({case.name for case in everything}) == len(everything)
    changes = {
        "tokens": 9,
        "adapters": 9,
        "ranks": (9,),
        "d_in": 9,
        "d_outs": (9,),
        "choices": 9,
        "popularity": "zipf",
        "runs": True,
        "dtype": "float16",
        "op": "backward",
        "cold": True,
    }
    assert set(changes) == set(vars(TINY))
    assert all(TINY.but(**{field: value}).name != TINY.name for field, value in changes.items())


def test_the_registry_covers_every_axis():
    assert {case.popularity for case in ALL} == set(registry.POPULARITIES)
    tokens, ranks = {case.tokens for case in ALL}, set(itertools.chain(*(case.ranks for case in ALL)))
    assert (min(tokens), max(tokens), min(ranks), max(ranks)) == (1, 4096, 4, 256)
    assert any(len(case.ranks) > 1 for case in ALL)
    widths = {case.d_in for case in ALL if case.op != "dispatch"}
    assert (min(widths), max(widths)) == (576, 14336)
    assert {len(case.d_outs) for case in ALL} >= {1, 3}
    assert {case.choices for case in ALL} == {1, 2, 4}
    assert {case.dtype for case in ALL} == set(registry.DTYPES)
    assert {case.op for case in ALL} == {"forward", "backward", "dispatch"}
    assert {case.cold for case in ALL} == {True, False}
    assert {sweep.axis for sweep in registry.SWEEPS} >= set(plots.LINES.values())
    assert len({target.row for target in registry.TARGETS if target.judged}) >= 9


def test_quick_measures_every_judged_target():
    judged = {target.case for target in registry.TARGETS if target.judged and target.device == "cpu"}
    assert judged <= set(registry.select(quick=True)) < set(ALL)


@pytest.mark.parametrize("popularity", registry.POPULARITIES)
def test_tokens_use_the_first_slots_and_come_in_runs_where_told(popularity):
    for runs in (False, True):
        case = TINY.but(tokens=40, adapters=8, choices=2, popularity=popularity, runs=runs)
        indices = inputs.route(case, torch.Generator().manual_seed(0))
        assert indices.shape == (40, 2)
        assert indices.unique().tolist() == list(range(int(indices.max()) + 1))
        assert not runs or indices[:, 0].diff().min() >= 0


def test_cold_weights_exceed_four_caches_and_all_copies_are_the_same():
    made = inputs.make(TINY.but(cold=True), "cpu", 10_000)
    used = made.bytes - made.case.tokens * (24 + 2 * 16) * 4
    assert made.copies * used > 40_000
    assert all(torch.equal(made.A[0][0][: made.used], copy[0][: made.used]) for copy in made.A)
    assert made.A[0][0].data_ptr() != made.A[1][0].data_ptr()
    # zero beyond the rank: rivals that know of no ranks compute the same
    assert made.A[0][0][0, 2:].abs().max() == 0 < made.A[0][0][0, :2].abs().min()


def test_bytes_and_operations_of_a_case_by_hand():
    made = inputs.make(TINY, "cpu", 0)  # ranks 2, 4, 2; two tokens each
    assert made.bytes == 4 * ((24 + 16) * 8 + 6 * 24 + 2 * 6 * 16)
    assert made.operations == 2 * (24 + 16) * 2 * 8
    back = inputs.make(TINY.but(op="backward"), "cpu", 0)
    assert back.operations == 2 * (3 * 24 + 2 * 16) * 2 * 8


CASES = [
    TINY,
    TINY.but(cold=True, dtype="bfloat16", d_in=64, d_outs=(4096,)),
    TINY.but(tokens=300, runs=True, popularity="zipf"),
    TINY.but(d_outs=(16, 8, 8)),
    TINY.but(choices=2),
    TINY.but(op="backward", runs=True),
    TINY.but(op="backward", choices=2),
    TINY.but(op="dispatch", ranks=(4,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_contender_that_runs_agrees_with_the_reference(case):
    record = measured(case)
    assert "seconds" in record["runs"]["lorakern"]
    for name, run in record["runs"].items():
        if "seconds" in run:
            assert run["error"] <= runner.TOLERANCES[case.dtype]
            assert 0 < run["min"] <= run["p25"] <= run["seconds"] <= run["p75"] <= run["max"]
            assert run["gb_s"] > 0 and run["gflop_s"] > 0 and run["of_floor"] > 0
        else:
            assert name not in ("lorakern", "mm loop", "gather + einsum") and run["note"]
    assert json.loads(json.dumps(record)) == json.loads(json.dumps(record, allow_nan=False))
    assert any(record["name"] in line for line in report.case_lines(record))


def wrong(made):
    call = contenders.lorakern_call(made)
    return lambda copy: (call(copy), made.y[-1].mul_(1.5))


def not_finite(made):
    return lambda copy: made.y.fill_(float("nan"))


@pytest.mark.parametrize("broken", [wrong, not_finite])
def test_no_speed_is_reported_for_a_wrong_result(broken):
    record = measured(TINY, mine={"lorakern": broken}, rivals={"broken": broken, "mm loop": rivals.mm_loop})
    for name in ("lorakern", "broken"):
        run = record["runs"][name]
        assert "seconds" not in run and "gb_s" not in run and run["note"].startswith("wrong")
    assert "seconds" in record["runs"]["mm loop"] and "ratio" not in record["runs"]["mm loop"]
    assert any("wrong" in line for line in report.case_lines(record))
    everything = made_up_run(record)
    assert "not timed" in results.page(everything)


def test_a_companion_is_timed_beside_its_case(monkeypatch):
    case = TINY.but(tokens=7)
    monkeypatch.setitem(registry.COMPANIONS, case, ("padded", case.but(ranks=(4,)), None))
    run = measured(case, rivals={})["runs"]["padded"]
    assert run["companion"] == case.but(ranks=(4,)).name and run["seconds"] > 0 and not run["ours"]


def test_absent_packages_and_large_temporaries_are_notes(monkeypatch):
    rivals._vllm.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm.lora.ops", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    runs = measured(TINY)["runs"]
    rivals._vllm.cache_clear()
    assert "vllm cannot be imported" in runs["vllm cpu"]["note"] and "\n" not in runs["vllm cpu"]["note"]
    assert "peft cannot be imported" in runs["peft mixed batch"]["note"]
    monkeypatch.setattr(rivals, "MOST_TEMPORARY", 10)
    assert "gathers" in measured(TINY)["runs"]["gather + einsum"]["note"]


def test_quick_is_of_one_device():
    for device in ("cpu", "cuda"):
        quick = set(registry.select(quick=True, device=device))
        assert {t.case for t in registry.TARGETS if t.judged and t.device == device} <= quick
        assert {(device, case) for case in quick} <= registry.QUICK


def test_functions_take_turns_and_slow_ones_get_fewer_samples():
    order = []
    timed = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, Effort(1e-9, 3, 5))
    assert {name: times["samples"] for name, times in timed.items()} == {"a": 3, "b": 3}
    runs = [name for name, _ in itertools.groupby(order)]
    assert runs == list("ab" * 4)


def test_floors_are_positive():
    probe = floors.ReadProbe("cpu")
    assert probe.bytes == 4 * floors.cache_bytes()
    loop = lk.backends.cpu._cpu.fma_loop
    for bf16 in (False, True):
        instruction, operations, checksum = loop(bf16, 10, 1)
        assert instruction and operations > 0 and checksum == loop(bf16, 10, 1)[2] != 0


@pytest.mark.parametrize("size", [1, 7, 63, 64, 1000, (256 << 10) + 9, (1 << 20) + 3])
def test_the_bandwidth_probe_reads_every_byte(size):
    buffer = torch.randint(0, 256, (size + 1,), dtype=torch.uint8)[1:]
    read = lk.backends.cpu._cpu.read_buffer
    whole = read(buffer.data_ptr(), size, 2)
    for place in {0, size // 2, size - 1}:
        buffer[place] ^= 0x5A
        assert read(buffer.data_ptr(), size, 2) != whole
        buffer[place] ^= 0x5A
    assert read(buffer.data_ptr(), size, 1) == whole


def test_json_lines_round_trip(tmp_path):
    run = made_up_run(made_up(), made_up(case=TINY))
    records.write(tmp_path / "a.jsonl", run)
    assert vars(records.read(tmp_path / "a.jsonl", "--from")) == json.loads(json.dumps(vars(run)))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["schema"] == records.SCHEMA and len(lines) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


def test_compare_prints_ratios_plain_and_over_the_floors():
    old, new = made_up(1e-3), made_up(2e-3)
    new["floor"] = new["floor"] | {"seconds": 16e-4}  # a machine of half the speed
    assert report.ratios(old, new) == pytest.approx((2.0, 1.0))
    lines = report.compare_lines(
        made_up_run(old, made_up(1e-3, case=TINY)), made_up_run(new, made_up(1.2e-3, case=TINY))
    )
    assert lines[2].split() == ["2.00", "1.00", old["name"]]
    assert lines[3].split() == ["1.20", "1.20", TINY.name, "SLOWER"]
    assert report.compare_lines(made_up_run(new), made_up_run(old))[2].split()[:2] == ["0.50", "1.00"]
    assert "no case in common" in report.compare_lines(made_up_run(old), made_up_run())


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot be read"),
        ("{", "is not JSON lines"),
        ("\x00\xff", "is not JSON lines"),
        ("", "does not begin with the schema"),
        ("[1]\n", "does not begin with the schema"),
        ('{"schema": "lorakern-bench/0"}\n', "does not begin with the schema lorakern-bench/1"),
        ('{"schema": "lorakern-bench/1"}\n', "lacks what a run has"),
        ('{"schema": "lorakern-bench/1", "machine": {}, "floors": {}}\n{"name": "x"}\n', "lacks what a run has"),
        ('{"schema": "lorakern-bench/1", "machine": {}, "floors": {}}\n7\n', "lacks what a run has"),
    ],
)
def test_bad_files_are_refused_in_one_line(content, says, tmp_path, capsys):
    path = tmp_path / "old.jsonl"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert command.main(["--compare", str(path), "--only", TINY.name]) == 2  # no case is left either
    assert command.main(["--compare", str(path), "--suite", "dispatch"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"python -m benchmarks: bench: --compare {path} ") and says in error


FAST, SLOW = 1e-3, 4e-3  # 24 MB in 1 ms are 24 of 30 GB/s; 1e8 operations in 1 ms are 100 of 200 GFLOP/s


@pytest.mark.parametrize(
    "metric, bound, seconds, met, shown",
    [
        ("bandwidth", 0.8, FAST, True, "80.0% (24.0 of 30.0 GB/s)"),
        ("bandwidth", 0.8, SLOW, False, "20.0% (6.0 of 30.0 GB/s)"),
        ("mm_flops", 0.5, FAST, True, "50.0% (100 of 200 GFLOP/s)"),
        ("mm_flops", 0.7, FAST, False, "50.0% (100 of 200 GFLOP/s)"),
        ("speedup", 3, FAST, True, "3.00 x"),
        ("speedup", 3.1, FAST, False, "3.00 x"),
        ("seconds", 2e-3, FAST, True, "1000.00 us"),
        ("seconds", 1e-3, FAST, False, "1000.00 us"),
        ("companion", 1.15, 1.1e-3, True, "1.10 x"),
        ("companion", 1.15, 1.2e-3, False, "1.20 x"),
        ("per_choice", 1.15, 4.4e-3, True, "1.10 x"),
        ("per_choice", 1.15, 4.8e-3, False, "1.20 x"),
        ("proportional", 1.25, 0.75e-3, True, "1.20 (75% of the time for 62% of the ranks)"),
        ("proportional", 1.25, 1e-3, False, "1.60 (100% of the time for 62% of the ranks)"),
    ],
)
def test_targets_are_judged_by_the_measurements(metric, bound, seconds, met, shown):
    case = Case(4, 4, ranks=(16, 64, 16, 64), choices=4)
    run = made_up_run(made_up(seconds, {"rival": 3}, case, companion=1e-3))
    verdict = targets.evaluate(Target("row", "text", case, metric, bound, against="rival"), run)
    assert (verdict.met, verdict.measured) == (met, shown)


def test_a_target_without_its_measurement_is_neither_met_nor_missed():
    target = Target("row", "text", TINY, "speedup", 2, against="vllm cpu")
    assert targets.evaluate(target, made_up_run()) == targets.Verdict(None, None, "not measured")
    record = made_up(case=TINY)
    assert targets.evaluate(target, made_up_run(record)).measured == "vllm cpu: vllm cpu did not run"
    record["runs"]["lorakern"] = {"note": "wrong (error ratio 1): not timed", "error": 1.0, "ours": True}
    assert targets.evaluate(target, made_up_run(record)).met is None
    with pytest.raises(ValueError, match="unknown metric"):
        targets.evaluate(Target("row", "text", TINY, "nope", 2), made_up_run(made_up(case=TINY)))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def full_run(request):
    """A made-up run of every case of a device."""
    if request.param == "cpu":
        against = {"mm loop": 2.0, "vllm cpu": 100.0}
        return made_up_run(*(made_up(case=case, rivals=against, companion=1e-3) for case in ALL))
    made = [made_up(case=case, rivals={"vllm triton": 1.4}, companion=1e-3, kind="copy") for case in ON_A_GPU]
    run = made_up_run(*made)
    run.machine |= {"device": "cuda", "device_name": "NVIDIA H200", "device_cache_bytes": 60 << 20}
    run.floors = run.floors_after = FLOORS | {"copy_bandwidth": 4e12, "launch_seconds": 2e-6}
    run.failed["another case"] = "OutOfMemoryError: none left"
    made[0]["runs"]["vllm triton"]["note"] = "timed as Python launches it: the host waits"
    return run


def test_the_page_shows_every_target_sweep_and_case(full_run, tmp_path):
    device = full_run.machine["device"]
    name, before, all_cases = ("cpu", "", ALL) if device == "cpu" else ("gpu-h200", "gpu-h200-", ON_A_GPU)
    (tmp_path / f"{name}_notes.md").write_text("## What bounds what falls short\n\nThe memory.\n")
    page = results.write(tmp_path, full_run).read_text()
    for target in registry.TARGETS:
        assert (f"| {target.text} |" in page and target.row in page) == (target.device == device)
    assert "**met**" in page and "**falls short**" in page
    sweeps = [sweep for sweep in registry.SWEEPS if sweep.device == device]
    assert all((f"### {sweep.title}\n" in page) == (sweep in sweeps) for sweep in registry.SWEEPS)
    shown = {case.name for sweep in sweeps for _, case in sweep.points}
    assert all(case.name in page for case in all_cases if case.name not in shown)
    if device == "cuda":
        assert "# lorakern on NVIDIA H200" in page and "| copy bandwidth | 4000.0 GB/s | 4000.0 GB/s |" in page
        assert "- `another case`: OutOfMemoryError" in page and "- vllm triton, 1 cases: timed as Python" in page
    assert page.endswith("## What bounds what falls short\n\nThe memory.\n")
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {f"{before}{image}" for image in [*plots.LINES, "floors.png"]}
    assert all(f"({image})" in page and (tmp_path / image).read_bytes().startswith(b"\x89PNG") for image in images)
    assert (tmp_path / f"{name}.jsonl").is_file() and not list(tmp_path.glob(".*"))


def test_list_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(session, "measure", None)
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [case.name for case in ALL]
    assert command.main(["--list", "--suite", "gates", "--suite", "dispatch", "--only", "K4"]) == 0
    assert all("K4" in line and "(gates" in line for line in capsys.readouterr().out.splitlines())


def test_a_run_from_the_command_line_and_back_from_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(floors, "measure", lambda *_: copy.deepcopy(FLOORS))
    monkeypatch.setattr(session, "QUICK", ONCE)
    file = str(tmp_path / "a.jsonl")
    assert (
        command.main(["--suite", "dispatch", "--quick", "--no-rivals", "--json", file, "--plots", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    name = registry.SUITES["dispatch"][0].name
    assert name in out and "GB/s" in out and "C++ call" in out and "mm loop" not in out and "targets" in out
    assert command.main(["--from", file, "--compare", file, "--results", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert f"     1.00           1.00  {name}" in out
    assert f"`{name}`" in (tmp_path / "page" / "cpu.md").read_text()


def test_a_quick_run_on_a_slow_machine_says_what_it_leaves_out(capsys, monkeypatch):
    monkeypatch.setattr(floors, "measure", lambda *_: FLOORS)
    monkeypatch.setattr(session, "QUICK_SECONDS", -1)
    assert command.main(["--suite", "dispatch", "--quick"]) == 0
    assert "1 of 1 cases are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, says",
    [
        ("--suite nope", "bench: --suite must be one of decode, "),
        ("--only nope", "bench: no case is left"),
        ("--json nowhere/a.jsonl", "bench: --json nowhere/a.jsonl must be a file in a folder that exists"),
        ("--plots nowhere/b", "bench: --plots nowhere/b must be a folder"),
        ("--from nowhere.jsonl", "bench: --from nowhere.jsonl cannot be read"),
    ],
)
def test_bad_options_exit_with_2_and_one_line(line, says, capsys):
    cli = pytest.importorskip("lorakern.cli")
    for main, arguments in ((command.main, line.split()), (cli.main, ["bench", *line.split()])):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_without_a_device(capsys):
    assert command.main(["--device", "cuda"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert command.main(["--device", "tpu"]) == 2


def test_the_sub_command_passes_its_options_on_and_needs_the_checkout(tmp_path, monkeypatch, capsys):
    cli = pytest.importorskip("lorakern.cli")
    seen = []
    monkeypatch.setattr(session, "run", seen.append)
    line = (
        "bench --suite decode --suite gates --only r16 --quick --no-rivals --json a --plots b --results c --compare d"
    )
    assert cli.main([*line.split(), "--from", "e", "--list"]) == 0
    (options,) = seen
    assert options.suites == ("decode", "gates") and (options.only, options.quick, options.rivals) == (
        "r16",
        True,
        False,
    )
    names = [str(path) for path in (options.json, options.plots, options.results, options.compare, options.source)]
    assert names == list("abcde") and options.list and options.device == "cpu"
    monkeypatch.setattr(lk, "__file__", str(tmp_path / "lorakern" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "run it in a source checkout" in capsys.readouterr().err
