"""The composite tasks: questions and answers, ways that learn, a run that goes on, and the page."""

import doctest
import json
import statistics
from itertools import islice

import pytest
import tiny_models
import torch

from benchmarks.skills import __main__ as command
from benchmarks.skills import composites, composites_learn, composites_page, composites_run
from benchmarks.skills.__main__ import ADAPTERS
from benchmarks.skills.composites import COMPOSITES, SECONDS, composite
from benchmarks.skills.composites_learn import LEARNED, Budget, Lesson, combined, epoch_batch, mixed_batch
from benchmarks.skills.composites_run import FIRST, KINDS, SECOND, STATIC, WAYS, Results, Settings, learn, quick, run
from benchmarks.skills.merges import Way, ask
from benchmarks.skills.recipes import RECIPES
from benchmarks.skills.tasks import SKILLS, different, is_held_out, stream, to_pig_latin
from lorakern import LoraAdapter, LorakernError, merge
from lorakern.adapters.factors import LoraFactors
from lorakern.integrations import smollm2

NAMES = list(COMPOSITES)
SMALL = Budget(examples=8, shots=4, candidates=3, cat_epochs=2, lora_epochs=2, mix_steps=2)


class Tokenizer:
    """Stands in for a tokenizer: one token a byte, folded into a small vocabulary."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return Encoded(input_ids=[3 + byte % 58 for byte in text.encode()])


class Encoded(dict):
    __getattr__ = dict.__getitem__


def undone(second, answer):
    """The line that the second skill was given, found from the answer alone."""
    if second == "answer_json":
        return json.loads(answer)["answer"]
    return " ".join(reversed(answer.split())) if second == "reverse_words" else None


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_and_prompts_follow_the_rule(name):
    task = COMPOSITES[name]
    lead = SECONDS[task.second].lead
    # the words before the colon are those that the second skill was trained with
    assert all(p.startswith(f"{lead}: ") for p, _ in islice(stream(task.second, held_out=False, seed=0), 20))
    for prompt, answer in islice(task.stream(held_out=False, seed=3), 200):
        start, inner, line = prompt.split(": ", 2)
        assert start == lead
        words = line.split()
        right = {
            "iso_date": None,
            "sort_words": " ".join(sorted(words)),
            "reverse_words": " ".join(words[::-1]),
            "pig_latin": " ".join(map(to_pig_latin, words)),
            "email": f"{words[1].strip(',')}.{words[0]}@{words[-1]}.com".lower(),
        }[task.first]
        if task.second == "pig_latin":
            assert answer.split() == [to_pig_latin(word) for word in right.split()]
        elif right is not None:
            assert undone(task.second, answer) == right
        else:
            year, month, day = undone(task.second, answer).split("-")
            assert year in words and str(int(day)) in words and 1 <= int(month) <= 12
        own = dict(islice(stream(task.first, held_out=False, seed=0), 1))
        assert inner == next(iter(own)).split(": ")[0].lower().replace("iso", "ISO")


@pytest.mark.parametrize("second", SECONDS)
def test_what_a_second_skill_makes_of_a_line_is_its_own_answer(second):
    for prompt, answer in islice(stream(second, held_out=False, seed=1), 100):
        assert SECONDS[second].of(prompt.split(": ", 1)[1]) == answer


@pytest.mark.parametrize("name", NAMES)
def test_splits_cannot_overlap(name):
    asked = different(COMPOSITES[name].stream(held_out=True, seed=0), 100)
    assert len({prompt for prompt, _ in asked}) == 100 and all(is_held_out(prompt) for prompt, _ in asked)
    trained = {prompt for prompt, _ in islice(COMPOSITES[name].stream(held_out=False, seed=0), 2000)}
    assert not trained & {prompt for prompt, _ in asked}
    assert asked != different(COMPOSITES[name].stream(held_out=True, seed=1), 100)


def test_examples_in_docstrings_and_unknown_names():
    assert doctest.testmod(composites).failed == 0
    assert all(set(task.skills) <= set(SKILLS) and task.second in SECONDS for task in COMPOSITES.values())
    with pytest.raises(LorakernError, match="composite is 'juggling'; it takes one of"):
        composite("juggling")


def test_the_one_lora_has_the_modules_and_ranks_of_both():
    recipe = combined(("initials", "answer_json"), 30, seed=2)
    assert set(recipe.targets) == {"q_proj", "v_proj"} and recipe.steps == 30 and recipe.seed == 2
    assert recipe.lora["rank_pattern"] == {"q_proj": 4 + 4, "v_proj": 32 + 4}
    assert recipe.lora["alpha_pattern"] == {"q_proj": 16, "v_proj": 72}
    recipe = combined(("pig_latin", "reverse_words"), 1, seed=0)
    assert recipe.lora["rank_pattern"] == {"v_proj": 16, "down_proj": 8, "q_proj": 8, "k_proj": 8, "o_proj": 8}


def test_batches_hold_what_they_say():
    skills = ("clock", "email")
    batch = mixed_batch(skills, 0, 8, step=3)
    assert [prompt.split()[0] for prompt, _ in batch] == ["Convert"] * 4 + ["Make"] * 4
    assert not any(is_held_out(prompt) for prompt, _ in batch)
    assert batch == mixed_batch(skills, 0, 8, step=3)
    assert batch != mixed_batch(skills, 1, 8, step=3) and batch != mixed_batch(skills, 0, 8, step=4)
    items = [(str(i), "") for i in range(8)]
    epochs = [[*epoch_batch(items, 0, 4, 2 * e), *epoch_batch(items, 0, 4, 2 * e + 1)] for e in range(3)]
    assert all(sorted(epoch) == items for epoch in epochs) and epochs[0] != epochs[1]


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(composites_learn, "optimizer_name", lambda: "one_plus_one")
    model = tiny_models.llama()
    pair = tuple(
        LoraAdapter(dict(tiny_models.adapter(model, 2 + i, seed=i, targets=targets).items()))
        for i, targets in enumerate((("v_proj", "down_proj"), ("q_proj", "v_proj")))
    )
    return Lesson(
        COMPOSITES["answer_json of pig_latin"], pair, 1, SMALL, model, Tokenizer(), tmp_path, lambda note: None
    )


def delta(adapter, module):
    factors: LoraFactors = adapter[module]
    return factors.scale * factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("way", LEARNED)
def test_learned_ways_leave_the_model_alone_and_are_read_again(way, lesson, monkeypatch):
    before = {name: tensor.clone() for name, tensor in lesson.model.state_dict().items()}
    usual = lesson.model.config._attn_implementation
    lesson.model.lm_head.weight.requires_grad_(False)
    trainable = [weight.requires_grad for weight in lesson.model.parameters()]
    adapter, facts = learn(way, lesson)
    assert [weight.requires_grad for weight in lesson.model.parameters()] == trainable
    after = lesson.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert lesson.model.config._attn_implementation == usual and not lesson.model.training
    assert set(adapter) == {module for own in lesson.adapters for module in own}
    assert facts["loss"] > 0 and facts["first loss"] > 0

    monkeypatch.setitem(LEARNED, way, None)
    again, told = learn(way, lesson)
    assert told == facts and set(again) == set(adapter)
    for module in adapter:
        assert torch.equal(again[module].A, adapter[module].A) and torch.equal(again[module].B, adapter[module].B)


def test_weights_that_are_told_are_those_of_the_adapter(lesson):
    """Softmax weights of a module that both have sum to 1; LoraHub's cat is the weighted sum."""
    soup, facts = LEARNED["CAT softmax, composite examples"](lesson)
    only = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(delta(soup, only), delta(lesson.adapters[0], only))
    assert facts["weights"][0] > 0 and facts["weights"][0] + facts["weights"][1] > 1
    found, facts = LEARNED["LoraHub, cat"](lesson)
    mixed = merge(lesson.adapters, "cat", weights=facts["weights"])
    for module in found:
        torch.testing.assert_close(delta(found, module), delta(mixed, module))


def test_few_examples_are_those_of_the_training_split(lesson):
    items = lesson.of_skills(8)
    assert len(items) == 8 and [SECONDS["answer_json"].lead in prompt for prompt, _ in items] == [False, True] * 4
    items += lesson.of_composite(8)
    assert len({prompt for prompt, _ in items}) == 16 and not any(is_held_out(prompt) for prompt, _ in items)


POOL = {skill: LoraAdapter({"q": (torch.ones(2, 8) * i, torch.ones(6, 2), 1.0)}) for i, skill in enumerate(RECIPES, 1)}
WANTED = Settings(tuple(NAMES[:3]), 4, 2, 2, SMALL)


def made_up(way, kind, name, seed):
    return (WAYS.index(way) * 3 + KINDS.index(kind) * 5 + len(name) + seed) % 11 / 10


@pytest.fixture
def measured(monkeypatch):
    """Nothing is learned or generated: scores are made up, and what is asked for is recorded."""
    calls = []

    def asked(model, tokenizer, ways, questions, on_answers):
        name, seed = calls[-1]
        assert tuple(ways) == WAYS and tuple(questions) == KINDS
        on_answers(len(ways) * sum(len(items) for of_seed in questions.values() for items in of_seed))
        return {way: {kind: [made_up(way, kind, name, seed)] for kind in KINDS} for way in ways}

    def learned(way, lesson):
        if way == next(iter(LEARNED)):
            calls.append((lesson.composite.name, lesson.seed))
        return lesson.adapters[0], {"weights": [0.25, 1.5], "loss": 0.5, "first loss": 2.0}

    monkeypatch.setattr(composites_run, "ask", asked)
    monkeypatch.setattr(composites_run, "learn", learned)
    return calls


def finished(path, runs, wanted=WANTED, told=None):
    results = Results(path, wanted)
    for _ in run(results, None, None, POOL, runs, lambda n, note: None if told is None else told.append(n)):
        pass
    return results


def test_every_static_way_merges(measured):
    pair = [POOL["iso_date"], POOL["answer_json"]]
    assert len(set(WAYS)) == len(WAYS) == 3 + len(STATIC) + len(LEARNED)
    merged = {way.name: way.merged(pair, 0)["q"] for way in STATIC}
    total = delta(pair[0], "q") + delta(pair[1], "q")
    for name, weight in (("uniform mixture", 0.5), ("task arithmetic 0.4", 0.4), ("task arithmetic 1", 1.0)):
        torch.testing.assert_close(delta(merged, name), weight * total)
    # B is the same in both and A differs by a factor: A and B apart from each other have twice the sum
    torch.testing.assert_close(delta(merged, "linear, weights 1"), 2 * total)
    torch.testing.assert_close(delta(merged, "linear, weights 1/N"), total)


def test_a_run_goes_on_where_it_was_stopped(tmp_path, measured):
    path, runs, told = tmp_path / "composites.json", tmp_path / "runs", []
    finished(path, runs, told=told)
    assert measured == [(name, seed) for seed in range(2) for name in WANTED.composites]
    assert sum(told) == WANTED.answers * len(WANTED.parts())
    whole = path.read_text()

    path.unlink()
    measured.clear()
    parts = run(Results(path, WANTED), None, None, POOL, runs, lambda n, note: None)
    next(parts), next(parts)
    parts.close()
    assert "Unfinished: 2 of 6" in composites_page.page(Results(path, WANTED))
    measured.clear()
    told.clear()
    finished(path, runs, told=told)
    assert measured == WANTED.parts()[2:] and path.read_text() == whole
    assert sum(told) == WANTED.answers * len(WANTED.parts())
    with pytest.raises(LorakernError, match="is of other settings"):
        Results(path, Settings(WANTED.composites, 5, 2, 2, SMALL))
    with pytest.raises(LorakernError, match="learned with another budget"):
        finished(tmp_path / "other.json", runs, Settings(WANTED.composites, 4, 2, 2, Budget(examples=16)))


def test_page_and_plot(tmp_path, measured):
    results = finished(tmp_path / "composites.json", tmp_path / "runs")
    (tmp_path / "composites_notes.md").write_text("What it means.")
    page = composites_page.write(tmp_path, results).read_text()
    assert (tmp_path / "composites.png").read_bytes()[1:4] == b"PNG"
    assert "Unfinished" not in page and page.endswith("What it means.")
    way = WAYS[7]
    cells = []
    for kind, names in [("composite", [name]) for name in WANTED.composites] + [(k, WANTED.composites) for k in KINDS]:
        by_seed = [statistics.mean(made_up(way, kind, name, seed) for name in names) for seed in range(2)]
        cells.append(f"{statistics.mean(by_seed):.1%} ± {100 * statistics.stdev(by_seed):.1f}")
    assert f"| {way} | {' | '.join(cells)} |" in page
    assert f"| {next(iter(LEARNED))} | 0.25, 1.50 | 2.00 | 0.50 | - |" in page
    assert composites_page.plot(Results(tmp_path / "none.json", WANTED)) is not None


@pytest.mark.parametrize(
    "scores, line",
    [
        ((0.1, 0.2, 0.3, 0.4), "(10.0%) < the best merge without data (20.0%) < data-mix LoRA (30.0%) < CAT softmax"),
        (
            (0.1, 0.1, 0.3, 0.2),
            "skill (10.0%) = the best merge without data (10.0%) < CAT softmax, skills' data (20.0%)",
        ),
    ],
)
def test_order_of_the_paper(scores, line, tmp_path):
    results = Results(tmp_path / "composites.json", Settings((NAMES[0],), 4, 2, 1, SMALL))
    known = dict(zip((SECOND, STATIC[-1].name, "data-mix LoRA", composites_page.CATS[0]), scores, strict=True))
    of_way = {way: dict.fromkeys(KINDS, known.get(way, 0.0)) for way in WAYS}
    results.records = [{"composite": NAMES[0], "seed": 0, "scores": of_way, "learned": {way: {} for way in LEARNED}}]
    page = composites_page.page(results)
    assert line in page
    assert page.count("; as in the paper") == (scores == (0.1, 0.2, 0.3, 0.4))
    assert f"| {SECOND} | 10.0% | 10.0% | 10.0% | 10.0% |" in page


def test_command(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (None, None))
    # merging the shipped adapters takes seconds, and has its own tests
    monkeypatch.setattr(Way, "merged", lambda way, adapters, seed: adapters[0])
    arguments = ["composites", NAMES[0], "--quick", "--out", str(tmp_path / "new"), "--runs", str(tmp_path / "runs")]
    command.app(arguments, standalone_mode=False)
    written = json.loads((tmp_path / "new" / "composites.json").read_text())
    assert [(r["composite"], r["seed"]) for r in written["records"]] == quick([NAMES[0]]).parts()
    assert (tmp_path / "new" / "composites.md").read_text().startswith("# Composite tasks")
    with pytest.raises(command.typer.BadParameter, match="juggling"):
        command.app(["composites", "juggling"], standalone_mode=False)
    with pytest.raises(command.typer.BadParameter, match="an --out of its own"):
        command.app(["composites", "--quick"], standalone_mode=False)


def test_free_weights_on_two_real_skills(tmp_path):
    """A few steps on the real model lower the loss on the composite, and its answers can be asked for."""
    model, tokenizer = smollm2.load()
    task = COMPOSITES["answer_json of iso_date"]
    pair = tuple(LoraAdapter.load(ADAPTERS / skill) for skill in task.skills)
    budget = Budget(examples=4, cat_epochs=4)
    lesson = Lesson(task, pair, 0, budget, model, tokenizer, tmp_path, lambda note: None)
    adapter, facts = LEARNED["CAT free, composite examples"](lesson)
    assert facts["loss"] < 0.9 * facts["first loss"]
    questions = {"own": [different(stream(task.first, held_out=True, seed=0), 2)]}
    scores = ask(model, tokenizer, {FIRST: [pair[0]], "CAT": [adapter]}, questions, lambda n: None)
    assert scores[FIRST]["own"] == [1.0] and 0.0 <= scores["CAT"]["own"][0] <= 1.0
