"""The shipped skill adapters merged by the command, served by lorakern and by PEFT on the real model."""

from pathlib import Path

import pytest
import torch
from cli_adapters import lorakern
from problems import error_ratio

from lorakern.adapters import LoraAdapter
from lorakern.integrations.transformers import attach

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

ADAPTERS = Path(__file__).resolve().parents[1] / "benchmarks" / "skills" / "adapters"
# other ranks, alphas and modules, rsLoRA and rank_pattern among them
SKILLS = ["answer_json", "roman", "initials", "email"]
MERGES = {
    "cat": ["--weights", "0.5", "0.4", "-0.3", "1"],
    "svd": ["-m", "svd", "--rank", "8", "--dtype", "float32"],
    "ties": ["-m", "ties", "--density", "0.3", "--weights", "1", "2", "1", "0.5", "--dtype", "float16"],
    "knots": ["-m", "knots", "--normalize"],
    "peft_linear": ["-m", "peft_linear"],
}


@pytest.mark.slow
def test_merges_give_the_logits_of_their_peft_form(tmp_path, capsys):
    from lorakern.integrations import smollm2

    model, tokenizer = smollm2.load()
    texts = ["Write 14 in Roman numerals:", "Reply in JSON: blue", "The capital of France is"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    skills = [ADAPTERS / name for name in SKILLS]
    for name, options in MERGES.items():
        lorakern(capsys, "merge", *skills, "-o", tmp_path / name, *options)
    attached = attach(model, {name: LoraAdapter.load(tmp_path / name) for name in MERGES})
    with torch.inference_mode():
        base = model(**inputs).logits
        ours = {}
        for name in MERGES:
            with attached.use([name] * len(texts)):
                ours[name] = model(**inputs).logits
    attached.detach()
    first, *others = MERGES
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / first, adapter_name=first)
    for name in others:
        adapted.load_adapter(tmp_path / name, adapter_name=name)
    for name in MERGES:
        adapted.set_adapter(name)
        with torch.inference_mode():
            theirs = adapted(**inputs).logits
        assert error_ratio(theirs, base) > 1e-2
        assert error_ratio(ours[name], theirs) < 1e-5, name
