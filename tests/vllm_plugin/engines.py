"""Real engines for the tests: each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lorakern.integrations import smollm2

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SKILLS = REPOSITORY / "benchmarks/skills/adapters"


def model_folder():
    """SmolLM2 as Hugging Face files; they are made once."""
    folder = REPOSITORY / "build/smollm2"
    if not (folder / "tokenizer.json").is_file():
        weights, tokenizer = smollm2.load()
        weights.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def generate(folder, requests, lorakern, **engine):
    """The tokens of every request and the ranks of the slots, and what the engine logged."""
    job = folder / "job.json"
    job.write_text(json.dumps({"engine": engine, "requests": requests}))
    environment = os.environ | {"LORAKERN_VLLM": "" if lorakern else "0"}
    done = subprocess.run(
        [sys.executable, HERE / "generate.py", job], capture_output=True, text=True, env=environment, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), log
