"""What a run prints: the machine, the floors, a block a case, the targets, and the comparison with an earlier run."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import machine, registry
from benchmarks.records import Results, bandwidth, first_run
from benchmarks.targets import evaluate


def duration(seconds: float) -> str:
    """Seconds in the unit that fits.

    >>> duration(0.0000123), duration(0.0123)
    ('12.30 us', '12.30 ms')
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.2f} {name}"
    return f"{seconds * 1e6:.2f} us"


def floor_lines(floors: dict) -> list[str]:
    """The measured floors, one a line."""
    flops = {f"torch.mm {k}": v for k, v in floors["mm_flops"].items()}
    flops |= {f"registers alone, {k}": v for k, v in floors["fma_flops"].items()}
    return [
        *([f"copy bandwidth  {floors['copy_bandwidth'] / 1e9:.1f} GB/s"] if "copy_bandwidth" in floors else []),
        f"read bandwidth  {floors['read_bandwidth'] / 1e9:.1f} GB/s",
        *([f"empty kernel in a graph  {duration(floors['launch_seconds'])}"] if "launch_seconds" in floors else []),
        *(f"{name}  {value / 1e9:.0f} GFLOP/s" for name, value in flops.items()),
    ]


def header_lines(results: Results) -> list[str]:
    return [*machine.lines(results.machine), *floor_lines(results.floors)]


def case_lines(record: dict) -> list[str]:
    """A case: its floor, then a line for each contender."""
    floor, tokens = record["floor"], record["case"]["tokens"]
    kind, rate = bandwidth(floor)
    source = "from memory" if record["case"]["cold"] else "from the caches"
    checked = "all rows" if record["rows_checked"] == tokens else f"{record['rows_checked']} of {tokens} rows"
    out = [
        "",
        record["name"],
        f"  {floor['bytes'] / 1e6:.1f} MB {source}, {floor['operations'] / 1e6:.0f} MFLOP; floor "
        f"{duration(floor['seconds'])} by {floor['bound']} ({kind} {rate / 1e9:.1f} GB/s); "
        f"{checked} checked",
    ]
    for name, run in record["runs"].items():
        if "seconds" not in run:
            out.append(f"  {name:18} no time: {run['note']}")
            continue
        spread = f"[{duration(run['p25'])} .. {duration(run['p75'])}] n={run['samples']}"
        line = f"  {name:18} {duration(run['seconds']):>10} {spread:34}"
        if "companion" in run:
            line += f" {record['name']} is {1 / run['ratio']:.2f} x this"
        else:
            line += f" {run['gb_s']:6.1f} GB/s {run['gflop_s']:7.1f} GFLOP/s {run['of_floor']:6.1%} of the floor"
            line += f"  error {run['error']:.1e}"
            line += "" if run["ours"] else f"  {run['ratio']:.2f} x ours" if "ratio" in run else ""
        out.append(line)
        if "note" in run:
            out.append(f"  {'':18} {run['note']}")
    return out


def target_rows(results: Results) -> Iterator[tuple[registry.Target, str, str]]:
    """(target, what was measured, the verdict in a word) of every target with a measured case."""
    for target in registry.TARGETS:
        if target.case.name not in results.records or target.device != results.machine["device"]:
            continue
        verdict = evaluate(target, results)
        word = "not measured" if verdict.met is None else "met" if verdict.met else "falls short"
        yield target, verdict.measured, word if target.judged else f"({word})"


def crossovers(results: Results) -> Iterator[tuple[str, float]]:
    """(case, time of Triton over that of CUDA) where both ran: what lorakern/backends/crossover.py is filled from."""
    for name, record in results.records.items():
        runs = [record["runs"].get(f"lorakern {backend}", {}) for backend in ("cuda", "triton")]
        if all("seconds" in run for run in runs):
            yield name, runs[1]["seconds"] / runs[0]["seconds"]


def target_lines(results: Results) -> list[str]:
    rows = list(target_rows(results))
    out = ["", "targets"] if rows else []
    for target, measured, word in rows:
        temperature = " [cold]" if target.case.cold and not target.judged else ""
        out.append(f"  {word:13} {target.row}{temperature}: {target.text}; measured {measured}")
    return out


def compare_lines(old: Results, new: Results) -> list[str]:
    """Ratios of the times new / old of the cases that both runs have, plain and each over the floor of its own run."""
    out = ["", "new / old      of floors  case"]
    common = [name for name in new.records if name in old.records]
    for name in common:
        (_, before), (_, after) = first_run(old.records[name]), first_run(new.records[name])
        if "seconds" not in before or "seconds" not in after:
            out.append(f"{'':25}  {name}: {(after if 'seconds' not in after else before)['note']}")
            continue
        plain, normal = ratios(old.records[name], new.records[name])
        flag = "SLOWER" if normal > 1.1 else "faster" if normal < 1 / 1.1 else ""
        out.append(f"{plain:9.2f}      {normal:9.2f}  {name}  {flag}".rstrip())
    if not common:
        out.append("no case in common")
    if missing := len(set(old.records) ^ set(new.records)):
        out.append(f"{missing} cases are in one of the two runs only")
    return out


def ratios(old: dict, new: dict) -> tuple[float, float]:
    """New time over old, and the same with each time divided by the floor of its own run."""
    plain = first_run(new)[1]["seconds"] / first_run(old)[1]["seconds"]
    return plain, plain * old["floor"]["seconds"] / new["floor"]["seconds"]
