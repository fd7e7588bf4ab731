"""What of the GPU benchmark and of `make gpu` needs no GPU: targets, floors, file names, layouts, steps."""

import importlib.util
import sys
from pathlib import Path

import gpu
import pytest
import torch
from test_bench import FLOORS, ONCE, TINY, Probe, made_up, made_up_run

from benchmarks import alone, floors, gpu_rivals, graphs, inputs, machine, registry, report, results, runner, session
from benchmarks.contenders import Skipped
from benchmarks.registry import Case
from lorakern.errors import LorakernError


def test_a_suite_its_sweeps_and_its_targets_are_for_one_device():
    on_a_gpu = [target for target in registry.TARGETS if target.device == "cuda"]
    assert {target.case for target in on_a_gpu} <= set(registry.SUITES["gpu"]) == set(registry.select(device="cuda"))
    bounds = {target.metric: target.bound for target in on_a_gpu}
    assert bounds == {"seconds": 7e-6, "bandwidth": 0.85, "companion": 1.15, "proportional": 1.25, "speedup": 1.5}
    assert [t.bound for t in on_a_gpu if t.metric == "seconds"] == pytest.approx([3e-6, 4e-6, 7e-6])
    assert {registry.COMPANIONS[t.case][2] for t in on_a_gpu if t.metric == "companion"} == {"mm loop on runs"}


def test_a_target_of_another_device_is_not_shown():
    case = Case(64, 64, cold=True)  # of the CPU's decode suite and of the GPU's
    run = made_up_run(made_up(case=case))
    assert {target.device for target, _, _ in report.target_rows(run)} == {"cpu"}
    run.machine["device"] = "cuda"
    assert {target.device for target, _, _ in report.target_rows(run)} == {"cuda"}


def test_the_page_says_which_backend_was_faster():
    run = made_up_run(made_up())
    assert list(report.crossovers(run)) == [] and "CUDA or Triton" not in results.page(run)
    (name, record), *_ = run.records.items()
    ours = next(iter(record["runs"].values()))
    record["runs"] |= {"lorakern cuda": ours, "lorakern triton": ours | {"seconds": 1.5 * ours["seconds"]}}
    assert list(report.crossovers(run)) == [(name, pytest.approx(1.5))]
    assert f"| `{name}` | 1.50 |" in results.page(run)


def test_files_are_named_after_the_device():
    def name(device):
        return machine.file_name({"device": "cuda", "device_name": device})

    assert (name("NVIDIA H200"), name("Tesla T4")) == ("gpu-h200", "gpu-tesla-t4")
    assert name("NVIDIA RTX 6000 Ada (x/y)") == "gpu-rtx-6000-ada-x-y"


def test_the_floor_counts_bytes_where_they_come_from_memory():
    made = inputs.make(TINY, "cpu", 0)
    assert runner.floor_of(made, 1e12, 1e9)["bound"] == "operations"
    assert runner.floor_of(made, 1e12, 1e9, "copy", made.bytes)["bound"] == "operations"
    floor = runner.floor_of(made, 1e12, 1e9, "copy", made.bytes - 1)
    assert floor["bound"] == "bytes" and floor["seconds"] == made.bytes / 1e9 and floor["copy_bandwidth"] == 1e9
    cold = inputs.make(TINY.but(cold=True), "cpu", 100)
    assert runner.floor_of(cold, 1e12, 1e9, "copy")["seconds"] == cold.bytes / 1e9


def test_a_copy_moves_its_bytes_twice():
    probe = floors.CopyProbe("cpu", 1 << 10)
    probe()
    assert probe.bytes == 2 << 10 and torch.equal(probe.source, probe.target) and probe.source.count_nonzero() == 128
    assert floors.mm_operations("cuda") == 2 * 8192**3


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("copies", [1, 3, 64, 900])
def test_a_graph_goes_through_all_copies(seconds, copies):
    calls = graphs.calls_in_a_graph(seconds, copies)
    assert calls % copies == 0 and calls >= copies
    assert calls * seconds <= graphs.REPLAY + copies * seconds


def test_graphs_take_turns_and_what_waits_is_launched_by_python(monkeypatch):
    """With stand-ins for the device: a graph calls what it captured, and an event pair is one unit of time a launch."""
    order, captured = [], []

    class Graph:
        def __init__(self, function):
            self.function = function
            captured.append(self)

        def replay(self):
            self.function()

    def timed(launch):
        launch()
        return 1e-3

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(graphs, "_timed", timed)
    monkeypatch.setattr(graphs, "_capture", Graph)
    monkeypatch.setattr(graphs, "_waits", lambda function: "it waits" if function is waits else None)

    def waits():
        order.append("waits")

    cold = runner.Rotating(order.append, 4)
    times = graphs.in_turns({"cold": cold, "waits": waits}, graphs.Effort(1e-9, 3, 5))
    assert len(captured) == 1 and times["cold"]["calls"] % 4 == 0 and "note" not in times["cold"]
    assert times["waits"]["note"] == "timed as Python launches it: it waits"
    assert times["cold"]["samples"] == times["waits"]["samples"] == 3
    assert times["cold"]["seconds"] == pytest.approx(1e-3 / times["cold"]["calls"])
    order.clear()
    captured[0].replay()
    assert sorted(set(order)) == [0, 1, 2, 3] and len(order) == times["cold"]["calls"]


def test_a_rival_that_breaks_is_a_note(monkeypatch):
    def broken(made):
        raise RuntimeError("no kernel\nimage")

    runs = runner.measure(TINY, FLOORS, Probe(), ONCE, {"broken": broken})["runs"]
    assert runs["broken"]["note"] == "failed: RuntimeError: no kernel image" and "seconds" in runs["lorakern"]


def test_a_case_that_fails_ends_neither_the_run_nor_its_files(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(floors, "measure", lambda *_: FLOORS)
    monkeypatch.setattr(runner, "measure", fails)
    with pytest.raises(LorakernError, match="cases failed, among them dispatch-"):
        session.run(session.Options(suites=("dispatch",), json=tmp_path / "a.jsonl"))
    assert "OutOfMemoryError: too large" in (tmp_path / "a.jsonl").read_text()


def test_chunks_cover_all_rows_of_each_adapter():
    made = inputs.make(Case(150, 3, d_in=8, d_outs=(8,), popularity="zipf"), "cpu", 0)
    batch = gpu_rivals.chunks(made)
    starts, slots = batch.seg_indptr.tolist(), batch.weight_indices.tolist()
    assert batch.max_len == 32 and batch.num_segments == len(slots) == len(starts) - 1
    for slot, start, stop in zip(slots, starts, starts[1:], strict=False):
        assert 0 < stop - start <= 32 and set(made.indices[batch.permutation[start:stop]].tolist()) == {slot}
    assert sorted(batch.permutation.tolist()) == list(range(150))


def test_files_of_a_package_are_imported_without_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "anengine" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "anengine" / "__init__.py").write_text("raise RuntimeError('needs a server')")
    (folder / "__init__.py").write_text("raise RuntimeError('needs a server')")
    (folder / "kernel.py").write_text(
        "from anengine import flags\nfrom anengine.deep.logger import log\nX = flags.FLAG"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_ins = {"anengine.flags": {"FLAG": 3}, "anengine.deep.logger": {"log": print}}
    (kernel,) = alone.load("anengine", ["anengine.ops.kernel"], stand_ins)
    assert kernel.X == 3 and not [name for name in sys.modules if name.startswith("anengine")]
    with pytest.raises(Skipped, match="cannot be imported: cannot import name 'flags'"):
        alone.load("anengine", ["anengine.ops.kernel"], {})
    with pytest.raises(Skipped, match="is not installed"):
        alone.load("no_such_engine", ["no_such_engine.ops"], {})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_calls_fit_the_installed_vllm():
    import inspect

    metadata, shrink, expand, utils = gpu_rivals._vllm()
    made = metadata.LoRAKernelMeta.make(2, 3, "cpu")
    made.prepare_tensors(torch.tensor([0, 1, 0], dtype=torch.int32))
    routing = made.meta_args(3, False)
    inspect.signature(shrink._lora_shrink).bind(0, 0, 0, *routing, 1.0)
    inspect.signature(expand._lora_expand).bind(0, 0, 0, *routing, offset_start=0, add_inputs=True)
    assert utils._LORA_A_PTR_DICT == utils._LORA_B_PTR_DICT == {}


def fake(name, code, limit=20, **options):
    return gpu.Step(name, [sys.executable, "-c", code], limit, **options)


def test_a_step_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    )
    chosen = [
        fake("good", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "a gift"}),
        fake("bad", "raise SystemExit(3)"),
        fake("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=2),
        fake("deaf", deaf, limit=2),
        gpu.Step("absent", ["/no/such/program"], 5),
        gpu.Step("unneeded", ["/no/such/program"], 5, left_out="no such tool"),
        fake("last", "print('the end')"),
    ]
    assert gpu.main(chosen, tmp_path) == 1
    out = capsys.readouterr().out
    table = dict(line.split(maxsplit=1) for line in out.splitlines()[-7:])
    verdicts = {name: rest.split(" s  ")[1] for name, rest in table.items()}
    assert verdicts.pop("absent").startswith("failed ([Errno 2]")
    assert verdicts == {
        "good": "passed",
        "bad": "failed (exit status 3)",
        "slow": "failed (over 2 s)",
        "deaf": "failed (over 2 s)",
        "unneeded": "left out: no such tool",
        "last": "passed",
    }
    assert "a gift" in out and "KeyboardInterrupt" in (tmp_path / "slow.log").read_text()
    assert gpu.main([fake("good", ""), chosen[-2]], tmp_path) == 0


def test_the_steps_end_within_nine_minutes():
    planned = gpu.steps()
    assert [step.name for step in planned] == ["build", "tests", "memcheck", "racecheck", "bench"]
    assert sum(step.limit + gpu.GRACE for step in planned) < 540
    bench = planned[-1]
    assert float(bench.command[bench.command.index("--seconds") + 1]) + 30 <= bench.limit
    for step in planned:
        files = [part for part in step.command if part.endswith(".py")]
        assert all((gpu.ROOT / file).is_file() for file in files)
    assert Path(planned[0].command[0]) == Path(sys.executable)


def test_the_small_run_for_the_sanitizers_is_right():
    import gpu_small

    assert gpu_small.main("cpu", ("cpu",)) == 0
