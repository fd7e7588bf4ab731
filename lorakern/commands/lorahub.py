"""`lorakern lorahub`: one weight per adapter, searched on a few examples, into an adapter."""

from dataclasses import replace
from typing import Any

from lorakern.commands.learned import Clock, Run, told
from lorakern.errors import LorakernError
from lorakern.merge import lorahub

OPTIMIZERS = {
    "evolution": lorahub.evolution,
    "one-plus-one": lorahub.one_plus_one,
    "nevergrad": lorahub.nevergrad,
}
TITLE = "LoRA adapters merged by LoraHub"
WHAT = "The adapters as one, with a weight for each that was searched on a few examples, without gradients."


def run(run: Run, options: dict[str, Any], optimizer: str, rank: int | None) -> None:
    """Search for the weights of the adapters and write the merged adapter.

    Raises:
        LorakernError: an unknown optimizer, and as `lorakern.merge.lorahub.search`. OUT is as it was then.
    """
    if optimizer not in OPTIMIZERS:
        raise LorakernError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    clock = Clock()
    model, tokenizer, adapters, inputs, base = run.load()
    with run.console.progress("searching") as progress:
        hub = lorahub.search(
            model,
            adapters,
            str(run.data[0]),
            tokenizer=tokenizer,
            optimizer=OPTIMIZERS[optimizer],
            base_model_name_or_path=base,
            progress=lambda done, total, score: progress(done, total, f"score {score:.4f}"),
            **options,
        )
    options = {**options, "optimizer": optimizer}
    told_of = {"model": run.model, "data": run.data[0], "rank": rank, **options, "score": f"{hub.score:.4f}"}
    weighted = [replace(source, weight=f"{w:g}") for source, w in zip(inputs, hub.weights, strict=True)]
    written = run.write(hub.adapter(rank), TITLE, WHAT, weighted, told_of, run.out)
    trace = [{"weights": list(weights), "score": score} for weights, score in hub.trace]
    result = {"method": "lorahub", **written, "options": options, "weights": list(hub.weights), "score": hub.score}
    result |= {"trace": trace, "inputs": [vars(source) for source in weighted], "seconds": clock.seconds}
    best = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(run.adapters, hub.weights, strict=True))
    found = f"best of {len(hub.trace)} candidates: score {hub.score:.4f} at {best}, {clock.seconds:.1f} s"
    run.console.report(result, found, told(written))
