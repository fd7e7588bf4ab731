"""The benchmark of merged skill adapters: what is measured, a run that goes on, and the page."""

import json

import pytest
import torch
from merging import factors

from benchmarks.skills import __main__ as command
from benchmarks.skills import evaluate, merges, merges_page
from benchmarks.skills.__main__ import ADAPTERS
from benchmarks.skills.evaluate import exact_match
from benchmarks.skills.merges import BASE, OWN, WAYS, Results, Way, settings
from benchmarks.skills.tasks import held_out_items
from lorakern import LoraAdapter, LorakernError, merge
from lorakern.integrations import smollm2
from lorakern.integrations.transformers import attach


def adapter(ranks, seed=0):
    return LoraAdapter({name: factors(30, 25, rank, 0.5, seed=seed + rank) for name, rank in ranks.items()})


def fake_scores(way, skill, seed):
    return {BASE: 0.0, OWN: 1.0}.get(way, ((len(way) * 7 + len(skill) * 3 + seed) % 10) / 10)


@pytest.fixture
def measured(monkeypatch):
    """Nothing is generated: scores are made up, and what is asked for is recorded."""
    calls = []

    def measure(model, tokenizer, ways, skills, wanted, on_answers):
        calls.append(tuple(skills))
        on_answers(len(ways) * len(skills) * wanted.count * wanted.seeds)
        return {
            way: {skill: [fake_scores(way, skill, i) for i in range(wanted.seeds)] for skill in skills} for way in ways
        }

    monkeypatch.setattr(merges, "measure", measure)
    return calls


NAMES = ["clock", "roman", "email"]
POOL = {name: adapter({"q": i + 1, "v": 2}, seed=10 * i) for i, name in enumerate(NAMES)}


def test_every_way_merges_at_its_rank():
    adapters = [adapter({"q": 4, "v": 2}), adapter({"q": 4, "v": 3}, seed=50), adapter({"v": 2}, seed=90)]
    assert len({way.name for way in WAYS}) == len(WAYS)
    for way in WAYS:
        merged = way.merged(adapters, 0)
        if way.width is not None:
            assert {m: merged[m].rank for m in merged} == {"q": 4 * way.width, "v": 3 * way.width}
        one, other = merges.merges(way, adapters, 2)
        assert (one is other) == (not way.seeded)
    mean = Way("mean", "cat", "1/N").merged(adapters, 0)["v"]
    exact = merge(adapters, "cat", weights=[1 / 3] * 3)["v"]
    assert torch.equal(mean.B, exact.B) and mean.scale == exact.scale


class Characters:
    """Stands in for a tokenizer: a token is a character's number, and 0 says nothing."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(token) for token in row if token) for row in rows.tolist()]


def test_replies_end_where_they_cannot_become_right():
    replies = merges.Replies(Characters(), 2, ["a bc"] * 6)
    texts = ["", " a", "a b", "a bc", "a bd", "a bcd"]
    tokens = torch.tensor([[7, 7, *map(ord, text)] + [0] * (5 - len(text)) for text in texts])
    assert replies(tokens, None).tolist() == [False] * 4 + [True] * 2
    assert replies.read(tokens) == [text.strip() for text in texts]


def test_pairs_take_turns():
    names = [f"s{i}" for i in range(6)]
    assert len(settings(names, 5, 1).sets) == 15 + 1
    assert settings(names, 5, 1).sets[-1] == tuple(names)
    some = settings(names, 5, 1, pairs=5).sets[:-1]
    assert len(some) == 5 and {skill for pair in some for skill in pair} == set(names)
    assert settings(names[:2], 5, 1).sets == (("s0", "s1"),)


def test_a_run_goes_on_where_it_was_stopped(tmp_path, measured, monkeypatch):
    path, wanted = tmp_path / "merges.json", settings(NAMES, 4, 2)
    told = []
    merges.run(Results(path, wanted), None, None, POOL, lambda n, note: told.append(n))
    assert sum(told) == merges.total(wanted)
    whole, order = path.read_text(), list(measured)
    assert order[:3] == [(name,) for name in NAMES] and order[3:] == list(wanted.sets)

    path.unlink()
    measured.clear()
    usual = merges.measure

    def stopped(*arguments):
        if len(measured) == 4:
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(merges, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        merges.run(Results(path, wanted), None, None, POOL, lambda n, note: None)
    monkeypatch.setattr(merges, "measure", usual)
    measured.clear()
    told.clear()
    merges.run(Results(path, wanted), None, None, POOL, lambda n, note: told.append(n))
    assert measured == order[4:] and path.read_text() == whole
    assert sum(told) == merges.total(wanted)
    with pytest.raises(LorakernError, match="is of other settings"):
        Results(path, settings(NAMES, 5, 2))


def test_page_and_plot(tmp_path, measured):
    results = Results(tmp_path / "merges.json", settings(NAMES, 4, 2))
    merges.run(results, None, None, POOL, lambda n, note: None)
    (tmp_path / "merges_notes.md").write_text("What it means.")
    page = merges_page.write(tmp_path, results).read_text()
    way = WAYS[3]
    pairs = [pair for pair in results.settings.sets if len(pair) == 2]
    by_seed = [[fake_scores(way.name, s, i) for pair in pairs for s in pair] for i in range(2)]
    mean, spread = (f(torch.tensor([sum(x) / len(x) for x in by_seed])).item() for f in (torch.mean, torch.std))
    weaker = [[min(fake_scores(way.name, s, i) for s in pair) for pair in pairs] for i in range(2)]
    low, low_spread = (f(torch.tensor([sum(x) / len(x) for x in weaker])).item() for f in (torch.mean, torch.std))
    line = f"| {way.name} | {mean:.1%} ± {100 * spread:.1f} | {low:.1%} ± {100 * low_spread:.1f} |"
    assert line in page
    assert "Unfinished" not in page and page.endswith("What it means.")
    assert (tmp_path / "merges.png").read_bytes()[1:4] == b"PNG"
    results.sets.pop()
    assert "Unfinished: 1 of 4 sets" in merges_page.page(results)


@pytest.mark.parametrize(
    "scores, line",
    [
        (
            (0.1, 0.2, 0.3, 0.4),
            "weight average (10.0%) < task arithmetic (20.0%) < TIES, r (30.0%) < LEGO, r (40.0%); as",
        ),
        (
            (0.0, 0.0, 0.3, 0.2),
            "weight average (0.0%) = task arithmetic (0.0%) < LEGO, r (20.0%) < TIES, r (30.0%); not",
        ),
        (
            (0.0, 0.0, 0.1, 0.2),
            "weight average (0.0%) = task arithmetic (0.0%) < TIES, r (10.0%) < LEGO, r (20.0%); not",
        ),
    ],
)
def test_order_of_the_paper(scores, line, tmp_path):
    results = Results(tmp_path / "merges.json", settings(NAMES[:2], 4, 1))
    results.alone = {name: {BASE: [0.0], OWN: [1.0]} for name in NAMES}
    known = dict(zip(merges_page.EXPECTED, scores, strict=True))
    of_way = {way.name: {name: [known.get(way.name, 0.5)] for name in NAMES[:2]} for way in WAYS}
    results.sets = [{"skills": NAMES[:2], "scores": of_way}]
    assert line in merges_page.page(results)


def test_command(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (None, None))
    arguments = ["merges", "clock", "roman", "--count", "3", "--seeds", "1", "--out", str(tmp_path / "new")]
    command.app(arguments, standalone_mode=False)
    written = json.loads((tmp_path / "new" / "merges.json").read_text())
    assert [record["skills"] for record in written["sets"]] == [["clock", "roman"]]
    assert (tmp_path / "new" / "merges.md").read_text().startswith("# Merged skill adapters")


def test_answers_are_those_of_each_rows_adapter():
    """Rows of several adapters in one batch against PEFT, one adapter after the other."""
    from peft import PeftModel

    names, count = ["clock", "iso_date"], 3
    model, tokenizer = smollm2.load()
    questions = {name: held_out_items(name, count) for name in names}
    alone = {}
    for name in names:
        adapted = PeftModel.from_pretrained(model, ADAPTERS / name)
        alone[name] = [evaluate.answers(adapted, tokenizer, questions[asked]) for asked in names]
        adapted.unload()
    attached = attach(model, {name: LoraAdapter.load(ADAPTERS / name) for name in names})
    for place, asked in enumerate(names):
        rows = [(name, item) for item in questions[asked] for name in names]
        replies = merges.answers(attached, tokenizer, rows, lambda n: None)
        for i, name in enumerate(names):
            for reply, whole in zip(replies[i::2], alone[name][place], strict=True):
                # an answer that is too long to be right may be cut off
                assert reply and whole.startswith(reply)
            assert exact_match(replies[i::2], questions[asked]) == exact_match(alone[name][place], questions[asked])
    attached.detach()

    wanted = settings(names, count, 1)
    ways = {BASE: [None], OWN: [LoraAdapter.load(ADAPTERS / "clock")]}
    scores = merges.measure(model, tokenizer, ways, ["clock"], wanted, lambda n: None)
    assert scores == {BASE: {"clock": [0.0]}, OWN: {"clock": [1.0]}}
