"""LoRA Soups of shipped skill adapters on the real model: what is learned from texts of one of the skills."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from problems import error_ratio

from benchmarks.skills.tasks import END, format_prompt, stream
from lorakern.adapters import LoraAdapter
from lorakern.integrations.gated import GatedModel
from lorakern.integrations.transformers import attach
from lorakern.merge import lorahub, soups

pytest.importorskip("transformers")

ADAPTERS = Path(__file__).resolve().parents[1] / "benchmarks" / "skills" / "adapters"


@pytest.mark.slow
def test_the_skill_of_the_data_gains_weight():
    from lorakern.integrations import smollm2

    model, tokenizer = smollm2.load()
    adapters = [LoraAdapter.load(ADAPTERS / name) for name in ("roman", "reverse_words")]
    items = islice(stream("roman", held_out=False, seed=0), 12)
    data = [{"prompt": format_prompt(prompt), "answer": answer + END} for prompt, answer in items]
    assert tokenizer.eos_token == END
    soup = soups.learn(model, adapters, data, tokenizer=tokenizer, lr=0.3, epochs=2, warmup=1)
    weights = torch.stack([soup.weights[module] for module in adapters[0] if module in adapters[1]])
    assert len(soup.losses) == 4 and soup.losses[-1] < 0.7 * soup.losses[0]
    assert weights.mean(0)[0] > 0.55

    inputs = tokenizer(data[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        with GatedModel("test", model, adapters) as gated:
            gated.gates = torch.stack([soup.weights[module] for module in gated.modules])
            ours = model(**inputs).logits
        with attach(model, {"soup": soup.adapter(dtype=torch.float32)}).use(["soup"]):
            merged = model(**inputs).logits
    assert error_ratio(ours, merged) < 1e-4
    hub = lorahub.search(model, adapters, data[:2], tokenizer=tokenizer, budget=3)
    assert hub.trace[0][0] == (0.0, 0.0) and hub.score <= hub.trace[0][1]
