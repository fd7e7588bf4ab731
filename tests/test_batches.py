"""Data of a causal language model: texts, records, JSONL files and tokenised batches, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakern as lk
from lorakern.merge._batches import IGNORED, Batches

END = 0


class Numbers:
    """A tokenizer of numbers, each its own token; 1 begins a text."""

    eos_token_id = END

    def __init__(self, ends=False):
        self.ends = ends

    def __call__(self, text, add_special_tokens=True):
        ids = [int(word) for word in text.split()]
        return {"input_ids": [1, *ids, *[END] * self.ends] if add_special_tokens else ids}


def read(data, tokenizer=None, size=2, cutoff=8):
    return Batches("learn", data, tokenizer or Numbers(), size, cutoff)


def test_texts_are_padded_on_the_right_and_every_token_counts():
    (batch,) = read(["5 6 7", "8"]).epoch()
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, END], [1, 8, END, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 5, 6, 7, END], [1, 8, END, IGNORED, IGNORED]]


@pytest.mark.parametrize("ends", [False, True])
def test_the_loss_is_on_the_answer_where_there_is_one(ends):
    (batch,) = read([{"prompt": "5 6", "answer": "7"}, {"text": "8 9"}], Numbers(ends)).epoch()
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, END], [1, 8, 9, END, 0]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [7, END], [1, 8, 9, END, IGNORED]]


def test_what_is_beyond_the_cutoff_is_cut_off():
    (batch,) = read([{"prompt": "5 6", "answer": "7 8 9"}, "2 3 4 5 6"], cutoff=4).epoch()
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [7], [1, 2, 3, 4]]


def test_a_jsonl_file_is_the_list_of_its_records(tmp_path):
    records = [{"prompt": "5 6", "answer": "7"}, {"text": "8 9"}, {"prompt": "", "answer": "3"}]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    for name in (path, str(path)):
        for ours, theirs in zip(read(name).epoch(), read(records).epoch(), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_every_epoch_has_each_example_once_in_an_order_of_the_generator(count, size, seed):
    batches = read([str(k + 2) for k in range(count)], size=size)
    generator = torch.Generator().manual_seed(seed)
    epochs = [list(batches.epoch(generator)) for _ in range(2)]
    again = list(batches.epoch(torch.Generator().manual_seed(seed)))
    for epoch in epochs:
        assert len(epoch) == len(batches) == -(-count // size)
        assert sorted(row[1] for batch in epoch for row in batch["input_ids"].tolist()) == list(range(2, count + 2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, epochs[0], strict=True))


def test_tokenised_batches_keep_their_order_and_get_what_they_lack():
    ids, mask = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 1, 0]])
    data = iter([{"input_ids": ids, "attention_mask": mask}, {"input_ids": [[6, 7, 8, 9]]}])
    first, second = read(data, cutoff=3).epoch(torch.Generator())
    assert first["labels"].tolist() == [[3, 4, IGNORED]] and first["attention_mask"].tolist() == [[1, 1, 0]]
    assert second["input_ids"].tolist() == second["labels"].tolist() == [[6, 7, 8]]


BAD = {
    "empty list": ([], "data is empty"),
    "no data": (None, "data must be a list of texts"),
    "one record": ({"text": "5"}, "data must be a list of texts"),
    "empty text": ([""], r"data\[0\]: it must be a text"),
    "no text": (["5", 7], r"data\[1\]: it must be a text"),
    "no answer": ([{"prompt": "5"}], r"data\[0\]: it must be a text"),
    "long prompt": ([{"prompt": "2 3 4 5 6 7 8", "answer": "9"}], "none is left to learn from within the cutoff"),
    "mixed": (["5", {"input_ids": [[1, 2]]}], "texts and tokenised batches"),
    "floats": ([{"input_ids": [[0.5, 1.0]]}], "input_ids must be integers of shape"),
    "ragged": ([{"input_ids": [[1, 2], [3]]}], "input_ids must be a matrix of integers"),
    "one row": ([{"input_ids": [1, 2]}], "input_ids must be integers of shape"),
    "labels": ([{"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}], r"labels must be integers of shape \(1, 2\)"),
    "no label": ([{"input_ids": [[1, 2]], "labels": [[1, IGNORED]]}], "no label is left within the cutoff"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused(name):
    data, message = BAD[name]
    with pytest.raises(lk.LorakernError, match=message):
        read(data)


def test_texts_need_a_tokenizer():
    with pytest.raises(lk.LorakernError, match="texts need a tokenizer"):
        Batches("learn", ["5"], None, 1, 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"text": "5"}\n{"text": 5', "line 2 is not valid JSON"),
        ("[1]", "line 1 must be a record"),
        ('{"question": "5"}', "line 1: it must be a text"),
        ("\n\n", "data is empty"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, text, message):
    path = tmp_path / "few.jsonl"
    path.write_text(text)
    with pytest.raises(lk.LorakernError, match=message):
        read(path)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(lk.LorakernError, match=r"none\.jsonl cannot be read"):
        read(Path("none.jsonl"))
