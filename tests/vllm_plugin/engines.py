"""Real engines for the tests: each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lorakern.demo.requests import ASKED
from lorakern.integrations import smollm2

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SKILLS = REPOSITORY / "benchmarks/skills/adapters"
TAKES_OVER = "lorakern serves the LoRA layers on cpu"  # what it logs

# All layers at rank 4, attention at 8, ranks 4 and 32 side by side; and the tokens of an answer.
ADAPTERS = ("iso_date", "reverse_words", "initials")
TOKENS = 6


def run(folder, rounds, lorakern, environment=None, **engine):
    """What generate.py writes for these rounds, and what the engine logged."""
    job, answers, log = folder / "job.json", folder / "answers.json", folder / "log"
    job.write_text(json.dumps({"engine": engine, "rounds": rounds, "answers": str(answers)}))
    environment = os.environ | {"LORAKERN_VLLM": "" if lorakern else "0"} | (environment or {})
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, HERE / "generate.py", job], stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout=1200)
        finally:
            with suppress(ProcessLookupError):  # its workers, if it left any
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logged = log.read_text()
    assert status == 0, logged[-4000:]
    return json.loads(answers.read_text()), logged


def questions():
    """The prompts and answers of the ten skills that the demo asks, by skill."""
    known = json.loads((SKILLS / "prompts.json").read_text())
    return {skill: known[skill] for skill in ASKED}


def tokens(round):
    """Those of every answer of a round."""
    return [answer["tokens"] for answer in round["answers"]]


def model_folder():
    """SmolLM2 as Hugging Face files; they are made once."""
    folder = REPOSITORY / "build/smollm2"
    if not (folder / "tokenizer.json").is_file():
        weights, tokenizer = smollm2.load()
        weights.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def generate(folder, requests, lorakern, **engine):
    """The tokens of every request of one round and the ranks of the slots, and what the engine logged."""
    answers, log = run(folder, [requests], lorakern, **engine)
    return {"tokens": tokens(answers["rounds"][0]), "ranks": answers["ranks"][0]}, log
