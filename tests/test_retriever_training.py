"""Contrastive training of a tiny encoder: the loss and its formula, resuming to the same bits, what is refused."""

import copy
import math

import pytest
import torch

from lorakern import LorakernError
from lorakern.mixture import LoraRetriever, retrieval_accuracy, train_encoder
from lorakern.mixture import contrastive as module

TASKS = {
    "vowels": ["aei", "uioa", "eau", "oie"],
    "digits": ["123", "4871", "605", "99821"],
    "low": ["bcd", "cdf", "dfgb", "gfd"],
}


class Letters(torch.nn.Module):
    """The mean of a vector per letter, and a buffer and a parameter that no loss depends on."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(128, 8)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("constant", torch.full((), float(seed)))

    def embed(self, texts):
        return torch.stack([self.table(torch.tensor([ord(c) % 128 for c in text])).mean(0) for text in texts])

    @torch.inference_mode()
    def forward(self, texts):
        return self.embed(texts)


def train(encoder, **options):
    return train_encoder(encoder, TASKS, **{"steps": 12, "batch_size": 5, "lr": 0.05, "warmup": 2} | options)


@pytest.mark.parametrize("tasks", [["a", "b", "c", "d"], ["a", "b", "a", "c"], ["a", "a", "a", "b"]])
def test_the_loss_is_the_formula(tasks):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    cosines = [[(a @ b / (a.norm() * b.norm())).item() for b in right] for a in left]
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or tasks[j] != tasks[i]]
        for pairs in ([cosines[i][j] for j in others], [cosines[j][i] for j in others]):
            total -= cosines[i][i] / 0.07 - math.log(sum(math.exp(cosine / 0.07) for cosine in pairs))
    assert math.isclose(module.info_nce(left, right, tasks, 0.07).item(), total / 8, rel_tol=1e-5)


def test_training_separates_the_tasks():
    encoder = Letters()
    encoder.train()
    queries = {name: texts[2:] for name, texts in TASKS.items()}

    def accuracy():
        retriever = LoraRetriever(encoder)
        for name, texts in TASKS.items():
            retriever.add(name, texts[:2])
        return retrieval_accuracy(retriever, queries, ks=(1, 3))

    before, seen = accuracy(), []
    losses = train(encoder, steps=60, progress=lambda *step: seen.append(step))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]) and encoder.training
    assert accuracy()[1] == 1.0 >= before[1] and accuracy()[3] == before[3] == 1.0
    assert seen == [(i + 1, 60, loss) for i, loss in enumerate(losses)]
    assert torch.equal(encoder.unused, torch.ones(3)) and all(p.grad is None for p in encoder.parameters())


def test_the_seed_decides():
    assert train(Letters()) == train(Letters()) != train(Letters(), seed=1)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 4, 5, 11])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, killed_at):
    whole, resumed = Letters(), Letters()
    losses = train(whole)

    def kill(done, total, loss):
        if done == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(resumed, state=tmp_path, save_every=2, progress=kill)
    # it begins as another one: all that matters comes from the state, once there is one
    resumed = Letters(seed=0 if killed_at == 1 else 7)
    assert train(resumed, state=tmp_path, save_every=3) == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["train_encoder.safetensors"]


def test_a_finished_training_gives_its_losses_and_more_steps(tmp_path):
    longer = train(Letters(), steps=20)
    first = train(Letters(), state=tmp_path)
    assert train(Letters(), state=tmp_path) == first == longer[:12]
    assert train(Letters(), state=tmp_path, steps=20) == longer
    with pytest.raises(LorakernError, match="20 steps already"):
        train(Letters(), state=tmp_path)


@pytest.mark.parametrize("option", [{"seed": 1}, {"lr": 0.01}, {"batch_size": 4}, {"instruction": ""}, {"warmup": 3}])
def test_a_state_of_other_arguments_is_refused(tmp_path, option):
    train(Letters(), state=tmp_path, steps=2)
    encoder = Letters(3)
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(LorakernError, match=f"other {next(iter(option))}"):
        train(encoder, state=tmp_path, **option)
    with pytest.raises(LorakernError, match="other tasks"):
        train_encoder(encoder, TASKS | {"more": ["x", "y"]}, steps=12, batch_size=5, lr=0.05, warmup=2, state=tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in encoder.state_dict().items())


def test_a_damaged_state_is_refused(tmp_path):
    train(Letters(), state=tmp_path, steps=2)
    file = tmp_path / "train_encoder.safetensors"
    encoder, data = Letters(), file.read_bytes()
    encoder.table = torch.nn.Embedding(128, 9)
    with pytest.raises(LorakernError, match="another model"):
        train(encoder, state=tmp_path)
    for damaged in (b"", data[:-9], b"\x80\x04pickle" + data, data.replace(b"losses", b"lesses")):
        file.write_bytes(damaged)
        with pytest.raises(LorakernError, match=r"state: .*begin anew"):
            train(Letters(), state=tmp_path)


def test_a_loss_that_is_not_finite_leaves_the_last_weights():
    encoder, weights = Letters(), []

    def poison(done, total, loss):
        if done == 3:
            weights.append(copy.deepcopy(encoder.state_dict()))

    real = encoder.embed
    encoder.embed = lambda texts: real(texts) * (math.nan if weights else 1.0)
    with pytest.raises(LorakernError, match="not finite at step 4"):
        train(encoder, progress=poison)
    assert all(torch.equal(weight, encoder.state_dict()[name]) for name, weight in weights[0].items())


REFUSED = {
    "one task": lambda: train_encoder(Letters(), {"a": ["x", "y"]}),
    "one text": lambda: train_encoder(Letters(), TASKS | {"a": ["x", "x"]}),
    "texts that are a text": lambda: train_encoder(Letters(), TASKS | {"a": "xyz"}),
    "a callable": lambda: train_encoder(lambda texts: torch.ones(len(texts), 3), TASKS),
    "half precision": lambda: train_encoder(Letters().half(), TASKS),
    "nothing to train": lambda: train_encoder(Letters().requires_grad_(False), TASKS),
    "no gradients": lambda: train_encoder(NoGradients(), TASKS),
    "steps of 0": lambda: train(Letters(), steps=0),
    "a batch of 1": lambda: train(Letters(), batch_size=1),
    "a temperature of 0": lambda: train(Letters(), temperature=0),
    "an infinite lr": lambda: train(Letters(), lr=math.inf),
    "a seed of text": lambda: train(Letters(), seed="0"),
    "an instruction of None": lambda: train(Letters(), instruction=None),
    "queries of an unknown adapter": lambda: retrieval_accuracy(LoraRetriever(Letters()), {"a": ["x"]}),
    "no queries": lambda: retrieval_accuracy(LoraRetriever(Letters()), {}),
    "no k": lambda: retrieval_accuracy(LoraRetriever(Letters()), {"a": ["x"]}, ks=()),
}


class NoGradients(Letters):
    def embed(self, texts):
        return torch.ones(len(texts), 3)


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    with pytest.raises(LorakernError, match=r"must|fewer|float32|gradients|not in the retriever"):
        REFUSED[what]()
