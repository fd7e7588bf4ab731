"""The benchmark of IterIS on the skill adapters: what is measured, a run that goes on, and the page."""

import pytest
import tiny_models
import torch

from benchmarks.skills import iteris, iteris_page
from benchmarks.skills.iteris import BASE, LAST, LORA, OWN, REGMEAN, WAYS, Folded, Results, settings, texts
from benchmarks.skills.tasks import END, is_held_out
from lorakern import LorakernError, merge
from lorakern.merge import iteris as solver

WANTED = settings(list("abcdef"), 2, 50, 4, 2)


def fake_score(way, skill, seed):
    return {BASE: 0.0, OWN: 1.0}.get(way, ((len(way) * 7 + ord(skill) * 3 + seed) % 10) / 10)


def fake_run(skills, seed, objectives=(5.0, 6.0, 4.0, 1.5)):
    exact = {way: {skill: fake_score(way, skill, seed) for skill in skills} for way in (*WAYS, OWN, BASE)}
    known = {REGMEAN: 9.0, "IterIS": list(objectives)}
    return {"skills": skills, "seed": seed, "objectives": known, "exact": exact, "energy": 0.75}


def test_samples_are_different_training_questions_with_answers():
    lines = texts("clock", 30, 0)
    assert len(set(lines)) == 30 and all(line.endswith(END) for line in lines)
    assert lines[:10] == texts("clock", 10, 0) != texts("clock", 10, 1)
    assert not any(is_held_out(line.split("user\n")[1].split(END)[0]) for line in lines)


def test_every_way_is_the_merge_that_it_says():
    model = tiny_models.llama()
    adapters = tiny_models.three(model)
    samples = [tiny_models.batches(2, seed=i) for i in range(3)]
    record, notes = {"objectives": {}}, []
    ways = {way: dict(updates) for way, updates in iteris.merged(adapters, samples, model, None, record, notes.append)}
    assert tuple(ways) == WAYS and notes
    mean = merge(adapters, "cat", weights=[1 / 3] * 3)
    assert all(torch.equal(ways["mean of the updates"][module].B, mean[module].B) for module in mean)
    whole = solver.solve(model, adapters, samples, iterations=4, alpha=iteris.ALPHA)
    assert all(torch.equal(ways[LAST][module], whole.updates[module]) for module in whole.updates)
    assert record["objectives"]["IterIS"] == whole.objectives
    plain = solver.regmean(model, adapters, samples, alpha=iteris.ALPHA)
    assert record["objectives"][REGMEAN] == sum(solver.objective(model, adapters, samples, plain.updates).values())
    ranks = {module: max(a[module].rank for a in adapters if module in a) for module in whole.updates}
    assert all(ways[LORA][module].rank == max(ranks.values()) for module in ranks)
    assert 0 < record["energy"] <= 1


def test_folded_weights_hold_the_update_and_come_back_bit_for_bit():
    model = tiny_models.llama(dtype=torch.bfloat16)
    before = tiny_models.snapshot(model)
    adapter = tiny_models.three(model)[1]
    module, (A, B, scale) = next(iter(adapter.items()))
    folded = Folded(model)
    weight = model.get_submodule(module).weight
    old = weight.detach().float()
    with folded.by(adapter):
        assert torch.equal(weight.detach(), (old + scale * B @ A).bfloat16())
    tiny_models.assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), folded.by({module: torch.ones_like(old)}):
        raise KeyboardInterrupt
    tiny_models.assert_unchanged(model, before)


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    done = []

    def merged(adapters, samples, model, tokenizer, record, report):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(samples)
        record["objectives"] |= {REGMEAN: 2.0, "IterIS": [1.0]}
        yield from ((way, {}) for way in WAYS)

    monkeypatch.setattr(iteris, "merged", merged)
    monkeypatch.setattr(iteris, "texts", lambda skill, count, seed: [skill, count, seed])
    monkeypatch.setattr(
        iteris, "asked", lambda model, tokenizer, skills, count, seed: dict.fromkeys(skills, seed + 0.5)
    )
    path, pool = tmp_path / "iteris.json", {skill: {} for skill in "abcdef"}
    start = Results(path, WANTED)
    assert list(start.missing()) == [(skills, seed) for seed in range(2) for skills in WANTED.sets]
    model = torch.nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt):
        iteris.run(start, pool, model, model, None, lambda note: None)
    known = Results(path, WANTED)
    assert list(known.missing()) == [(WANTED.sets[1], 1)]
    done.clear()
    iteris.run(known, pool, model, model, None, lambda note: None)
    assert done == [[[skill, 50, 1] for skill in WANTED.sets[1]]] and not list(known.missing())
    assert all(run["exact"][OWN] == dict.fromkeys(run["skills"], run["seed"] + 0.5) for run in known.runs)
    with pytest.raises(LorakernError, match="is of other settings"):
        Results(path, settings(list("abcdef"), 2, 50, 5, 2))


def test_page_and_plot(tmp_path):
    results = Results(tmp_path / "iteris.json", WANTED)
    assert "Unfinished: 4 of 4 runs" in iteris_page.page(results)
    for skills, seed in list(results.missing()):
        results.runs.append(fake_run(skills, seed, (5.0, 6.0, 4.0, 1.5 + 10 * seed)))
    (tmp_path / "iteris_notes.md").write_text("What it means.")
    page = iteris_page.write(tmp_path, results).read_text()
    of_seeds = [[fake_score(REGMEAN, s, seed) for skills in WANTED.sets for s in skills] for seed in range(2)]
    means = torch.tensor(of_seeds).mean(1)
    assert f"| {REGMEAN} | {means.mean().item():.1%} ± {100 * means.std().item():.1f} | 9 |" in page
    assert f"| {LAST} | " in page and " | 6.5 |" in page
    assert "below RegMean's in 2 of 4 runs" in page
    assert "Unfinished" not in page and page.endswith("What it means.")
    assert (tmp_path / "iteris.png").read_bytes()[1:4] == b"PNG"
