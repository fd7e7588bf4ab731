"""LoraRetriever: mean embeddings, scores, order, exclusion, and adapters that come and go while others retrieve."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakern import LorakernError
from lorakern.mixture import INSTRUCTION, LoraRetriever

DIM = 24


def encoder(texts):
    """A vector of its own for every text, in float32."""
    rows = [torch.randn(DIM, generator=torch.Generator().manual_seed(hash_of(text))) for text in texts]
    return torch.stack(rows) if rows else torch.empty(0, DIM)


def hash_of(text):
    return int.from_bytes(text.encode()[-7:], "little")


def pool(names="abcdef", **options):
    retriever = LoraRetriever(encoder, **options)
    for name in names:
        retriever.add(name, [f"{name}{i}" for i in range(3)])
    return retriever


@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_scores_are_those_of_mean_embeddings(similarity):
    retriever = pool(similarity=similarity)
    query = encoder([f"{INSTRUCTION}: some text"])[0].double()
    expected = {}
    for name in "abcdef":
        mean = encoder([f"{INSTRUCTION}: {name}{i}" for i in range(3)]).double().mean(0)
        cosine = similarity == "cosine"
        expected[name] = ((mean @ query) / (mean.norm() * query.norm() if cosine else 1)).item()
    (found,) = retriever.retrieve(["some text"], k=6)
    assert [name for name, _ in found] == sorted(expected, key=lambda name: -expected[name])
    assert all(math.isclose(score, expected[name], rel_tol=1e-6, abs_tol=1e-6) for name, score in found)
    assert retriever.retrieve(["some text"], k=2) == [found[:2]]


def test_the_instruction_is_prefixed_or_not():
    seen = []
    retriever = LoraRetriever(lambda texts: seen.extend(texts) or encoder(texts), instruction="")
    retriever.add("a", ["one"])
    retriever.retrieve(["two"])
    assert seen == ["one", "two"]


def test_a_score_is_the_same_alone_and_in_any_batch():
    retriever = pool()
    texts = [f"text {i}" for i in range(37)]
    assert retriever.retrieve(texts, k=4) == [row for text in texts for row in retriever.retrieve([text], k=4)]


def test_exclusion_row_by_row():
    retriever = pool()
    full = retriever.retrieve(["x", "x", "x", "x"], k=6)[0]
    names = [name for name, _ in full]
    rows = retriever.retrieve(["x"] * 4, k=3, exclude=[names[0], None, {names[1], names[4], "absent"}, set(names)])
    assert rows[0] == full[1:4] and rows[1] == full[:3] and rows[3] == []
    assert rows[2] == [full[0], full[2], full[3]]


def test_equal_scores_come_in_the_order_of_upload():
    retriever = LoraRetriever(similarity="inner_product")
    names = [f"n{i}" for i in (5, 3, 9, 1, 7, 2)]
    for name in names:
        retriever.add_embedding(name, torch.ones(DIM))
    retriever.add_embedding("best", torch.full((DIM,), 1.5))
    (found,) = retriever.search(torch.ones(1, DIM), k=5)
    assert [name for name, _ in found] == ["best", *names[:4]]
    retriever.remove("n3")
    retriever.add_embedding("n5", torch.ones(DIM), replace=True)
    (found,) = retriever.search(torch.ones(1, DIM), k=9)
    assert [name for name, _ in found] == ["best", "n9", "n1", "n7", "n2", "n5"]
    assert retriever.names == ["n9", "n1", "n7", "n2", "best", "n5"] and len(retriever) == 6
    assert "n3" not in retriever and "n5" in retriever


def test_an_empty_pool_finds_nothing():
    retriever = LoraRetriever(encoder)
    assert retriever.retrieve(["x", "y"]) == [[], []] and len(retriever) == 0 and retriever.names == []
    assert retriever.retrieve([]) == [] and "x" not in retriever
    retriever.add("a", ["a"])
    retriever.remove("a")
    assert retriever.retrieve(["x"]) == [[]] and len(retriever) == 0
    retriever.add("b", ["b"])
    assert [name for name, _ in retriever.retrieve(["x"])[0]] == ["b"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "replace", "remove"]), st.integers(0, 30)), max_size=250))
def test_it_is_an_ordered_dictionary(steps):
    retriever, model = LoraRetriever(similarity="inner_product"), {}
    for step, (action, number) in enumerate(steps):
        name, vector = f"n{number}", torch.tensor([float(step % 7), 1.0])
        fails = (name in model) if action == "add" else (name not in model and action == "remove")
        if fails:
            with pytest.raises(LorakernError, match=name):
                retriever.remove(name) if action == "remove" else retriever.add_embedding(name, vector)
            continue
        model.pop(name, None)
        if action == "remove":
            retriever.remove(name)
        else:
            retriever.add_embedding(name, vector, replace=action == "replace")
            model[name] = float(step % 7)
    assert retriever.names == list(model) and len(retriever) == len(model)
    if model:
        (found,) = retriever.search(torch.tensor([[1.0, 0.5]]), k=len(model) + 1)
        assert found == sorted(((n, s + 0.5) for n, s in model.items()), key=lambda pair: -pair[1])


def test_adding_and_removing_while_others_retrieve():
    """Every answer is one of a state that was: vectors of a name never change, so its score is known."""
    retriever = LoraRetriever(similarity="inner_product")
    retriever.add_embedding("stays", torch.tensor([1000.0, 0.0]))
    known = {f"n{i}": torch.tensor([float(i), 1.0]) for i in range(300)}
    stop, failures, answers = threading.Event(), [], []

    def read():
        try:
            while not stop.is_set():
                (found,) = retriever.search(torch.tensor([[1.0, 0.0]]), k=5)
                answers.append(len(found))
                assert found[0] == ("stays", 1000.0)
                assert all(score == known[name][0] for name, score in found[1:])
                assert len({name for name, _ in found}) == len(found)
                assert "stays" in retriever and "stays" in retriever.names
        except BaseException as error:
            failures.append(error)

    def write(part):
        try:
            for _ in range(4):
                for name in part:
                    retriever.add_embedding(name, known[name])
                for name in part:
                    retriever.remove(name)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    writers = [threading.Thread(target=write, args=(list(known)[i::2],)) for i in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures, failures[0]
    assert answers and retriever.names == ["stays"]


REFUSED = {
    "a text for texts": lambda r: r.retrieve("text"),
    "a number among texts": lambda r: r.add("x", ["a", 1]),
    "no texts": lambda r: r.add("x", []),
    "a name that is there": lambda r: r.add("a", ["x"]),
    "an empty name": lambda r: r.add("", ["x"]),
    "a name of two lines": lambda r: r.add("a\nb", ["x"]),
    "a long name": lambda r: r.add("x" * 256, ["x"]),
    "a number for a name": lambda r: r.add(3, ["x"]),
    "k of 0": lambda r: r.retrieve(["x"], k=0),
    "k of True": lambda r: r.retrieve(["x"], k=True),
    "exclude of another length": lambda r: r.retrieve(["x"], exclude=[]),
    "exclude that is a text": lambda r: r.retrieve(["x"], exclude="a"),
    "a vector of another width": lambda r: r.add_embedding("x", torch.ones(DIM + 1)),
    "a vector of zeros": lambda r: r.add_embedding("x", torch.zeros(DIM)),
    "a vector with NaN": lambda r: r.add_embedding("x", torch.full((DIM,), math.nan)),
    "a vector beyond float32": lambda r: r.add_embedding("x", torch.full((DIM,), 1e39, dtype=torch.float64)),
    "a matrix for a vector": lambda r: r.add_embedding("x", torch.ones(1, DIM)),
    "a vector of integers": lambda r: r.add_embedding("x", torch.ones(DIM, dtype=torch.int64)),
    "queries of another width": lambda r: r.search(torch.ones(1, DIM - 1)),
    "an unknown name": lambda r: r.remove("x"),
    "an encoder that is none": lambda r: LoraRetriever("minilm"),
    "an unknown similarity": lambda r: LoraRetriever(encoder, similarity="euclid"),
    "an unknown index": lambda r: LoraRetriever(encoder, index="annoy"),
    "an encoder of too few rows": lambda r: LoraRetriever(lambda texts: torch.ones(1, 4)).add("x", ["a", "b"]),
    "an encoder of lists": lambda r: LoraRetriever(lambda texts: [[1.0]]).add("x", ["a"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_change_nothing(what):
    retriever = pool()
    before = retriever.retrieve(["x"], k=6)
    with pytest.raises(LorakernError, match=r"must|is in|empty|holds|numbers|width|shape|not in"):
        REFUSED[what](retriever)
    assert retriever.retrieve(["x"], k=6) == before and retriever.names == list("abcdef")
