"""One run of the serving benchmark, from options to files."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import floors, machine
from benchmarks.records import check_target
from benchmarks.serving import adapters, checks, page, records, report
from benchmarks.serving.figures import figures, medians
from benchmarks.serving.records import Results
from benchmarks.serving.turns import Turns
from benchmarks.serving.workers import CONTENDERS, ENGINE, LORA, OURS, ROOT, THEIRS, Worker
from benchmarks.serving.workload import ADAPTERS, MAX_RANK, RANKS, REQUESTS, Cell, least, requests, select
from benchmarks.timing import QUICK, Effort, in_turns
from lorakern.errors import LorakernError

MODEL = ROOT / "build/smollm2"
REPEATS, QUICK_REPEATS = 7, 3


@dataclass(frozen=True)
class Options:
    """What the command line says; it documents each."""

    only: str | None = None
    quick: bool = False
    repeats: int | None = None
    ranks: tuple[int, ...] = RANKS
    vllm: bool = True  # start vLLM's LoRA too
    json: Path | None = None
    results: Path | None = None
    source: Path | None = None
    list: bool = False


def run(options: Options) -> None:
    """List, measure or read results; print them and write what the options name.

    Raises:
        LorakernError: an option cannot be met, an engine does not start, or its answers are wrong.
    """
    chosen = select(options.only, options.quick)
    if options.list:
        print(*(cell.name for cell in chosen), sep="\n")
        return
    _check(options, chosen)
    results = records.read(options.source) if options.source else measure(chosen, options)
    report.show(results)
    if options.json:
        records.write(options.json, results)
    if options.results:
        page.write(options.results, results)


def _check(options: Options, chosen: list[Cell]) -> None:
    check_target("--json", options.json)
    check_target("--results", options.results, folder=True)
    if not options.ranks or not all(1 <= rank <= MAX_RANK for rank in options.ranks):
        raise LorakernError(f"bench: --ranks must be 1 to {MAX_RANK}, joined by commas; got {options.ranks}")
    if options.repeats is not None and options.repeats < 1:
        raise LorakernError(f"bench: --repeats must be at least 1; got {options.repeats}")
    if not chosen and not options.source:
        raise LorakernError(f"bench: no cell is left by --only {options.only!r}; --list shows all names")


def model_config() -> dict:
    """The config of the served model, whose files are made in build/ where they are missing."""
    if not (MODEL / "tokenizer.json").is_file():
        from lorakern.integrations import smollm2

        weights, tokenizer = smollm2.load()
        weights.save_pretrained(MODEL)
        tokenizer.save_pretrained(MODEL)
    return json.loads((MODEL / "config.json").read_text())


def measure(chosen: list[Cell], options: Options) -> Results:
    """Start the engines, compare their answers, and let them take turns cell by cell."""
    start = time.monotonic()
    names = [name for name in CONTENDERS if options.vllm or name != THEIRS]
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    config = model_config()
    effort = QUICK if options.quick else Effort()
    probe = floors.bandwidth_probe("cpu")
    results = Results(
        machine.describe("cpu"),
        {
            "model": "SmolLM2-135M-Instruct",
            "engine": ENGINE,
            "lora": LORA,
            "ranks": options.ranks,
            "adapters": ADAPTERS,
            "repeats": repeats,
        },
        floors.measure("cpu", probe, effort),
        quick=options.quick,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorakern-serving-")))
        logs = MODEL.parent / "serving"
        logs.mkdir(exist_ok=True)
        workers = {}
        say("starting the engines (torch.compile takes a minute or two) ...")
        for name in names:
            workers[name] = Worker(name, MODEL, list(map(str, adapters.paths(folder))), logs)
            stack.callback(workers[name].close)
        adapters.write(folder, config, options.ranks)
        for name, worker in workers.items():
            results.engines[name] = worker.receive()
            checks.started(name, results.engines[name])
        report.show_header(results)
        results.check = checks.warm_up(workers, config["vocab_size"])
        say(report.check_line(results.check))
        turns = Turns(workers)
        for cell in chosen:
            bandwidth = probe.bytes / in_turns({"read": probe}, QUICK)["read"]["seconds"]
            results.records[cell.name] = _cell(cell, turns, config, options, repeats, bandwidth, results.floors)
            results.busy = turns.busy()
            say("\n".join(report.cell_lines(results.records[cell.name])))
            if options.json:  # each time, so that a run that is cut off leaves what it has
                records.write(options.json, results)
    results.floors_after = floors.measure("cpu", probe, effort)
    results.seconds = time.monotonic() - start
    return results


def say(text: str) -> None:
    print(text, flush=True)


def _cell(
    cell: Cell, turns: Turns, config: dict, options: Options, repeats: int, bandwidth: float, measured: dict
) -> dict:
    """The record of a cell."""
    asked = requests(cell, config["vocab_size"])
    timed = [name for name in turns.workers if not (options.quick and CONTENDERS[name].once)]
    answers = take_turns(timed, lambda name: turns.serve(name, asked), repeats)
    prompt_tokens = sum(len(request.prompt) for request in asked)
    runs = {}
    for name, of_turns in answers.items():
        repetitions = [figures(answer["times"], prompt_tokens) for answer in of_turns]
        same = all(answer["tokens"] == of_turns[0]["tokens"] for answer in of_turns)
        runs[name] = {"repetitions": repetitions, "median": medians(repetitions), "same_tokens": same}
    for name in turns.workers:
        runs.setdefault(name, {"note": "not timed in a quick run: minutes a cell"})
    record = {
        "name": cell.name,
        "cell": asdict(cell),
        "requests": REQUESTS,
        "prompt_tokens": prompt_tokens,
        "new_tokens": sum(request.new for request in asked),
        "least": least(asked, options.ranks, adapters.elements_of_a_rank(config)),
        "read_bandwidth": bandwidth,
        "mm_flops": floors.mm_flops(measured, ENGINE["dtype"]),
        "runs": {name: runs[name] for name in turns.workers},
    }
    if THEIRS in answers:
        record["agreement"] = checks.agreement(answers[OURS][0]["tokens"], answers[THEIRS][0]["tokens"])
    return record


def take_turns(names: list[str], serve: Callable[[str], dict], repeats: int) -> dict[str, list[dict]]:
    """Answers by contender: `repeats` of each, every other turn in the opposite order, after one that is not timed.

    A contender that is too slow for that serves once, in the middle, without the untimed answer.
    """
    often = [name for name in names if not CONTENDERS[name].once]
    answers = {name: [] for name in names}
    for name in often:
        serve(name)
    for turn in range(repeats):
        for name in often if turn % 2 == 0 else often[::-1]:
            answers[name].append(serve(name))
        if turn == repeats // 2:
            for name in names:
                if CONTENDERS[name].once:
                    answers[name].append(serve(name))
    return answers
