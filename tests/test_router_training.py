"""train_router on a small model: it learns, resumes to the bit, and leaves the model as it was."""

import pytest
import torch
from mixture_models import Letters, adapters, tiny

from lorakern.errors import LorakernError
from lorakern.mixture import train_router
from lorakern.mixture.modes import MODES

DATA = [{"prompt": f"{letter}{letter}", "answer": letter * 4} for letter in "abcdef"]


pytestmark = pytest.mark.usefixtures("one_thread")


def train(model=None, **options):
    model = tiny() if model is None else model
    options = {"steps": 12, "batch_size": 3, "lr": 0.05, "warmup": 2, "rank": 3, **options}
    return train_router(model, adapters(model, 3), DATA, tokenizer=Letters(), **options)


@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode].learned])
def test_the_loss_falls_and_the_model_is_given_back(mode):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    routers, losses = train(model, mode=mode, steps=40, batch_size=6, dropout=0.0)
    assert losses[-1] < losses[0] and len(losses) == 40
    assert routers.mode == mode and all(not tensor.requires_grad for tensor in routers.parameters().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path):
    whole, losses = train()

    class Stop(Exception):
        pass

    def stop(done, steps, loss):
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        train(state=tmp_path, save_every=3, progress=stop)
    again, more = train(state=tmp_path)
    assert more == losses
    for name, tensor in whole.parameters().items():
        assert torch.equal(tensor, again.parameters()[name])
    with pytest.raises(LorakernError, match="other lr"):
        train(state=tmp_path, lr=0.01)


def test_dropout_leaves_two():
    from lorakern.mixture.router_training import _Run
    from lorakern.mixture.routers import Routers

    model = tiny()
    made = adapters(model, 4)
    run = _Run(model, made, Routers.init(model, "ramole"), 0.6, 0)
    batch = {"input_ids": torch.ones(50, 4, dtype=torch.int64), "labels": torch.ones(50, 4, dtype=torch.int64)}
    counts = (run._tokens(batch, 0).indices >= 0).sum(1)
    run.close()
    assert counts.min() == 2 and counts.max() > 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "mixture"}, "learns nothing"),
        ({"mode": "soup"}, "mode must be one of"),
        ({"steps": 0}, "steps must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"lr": 1e30, "clip": 1e30}, "not finite"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    model = tiny()
    with pytest.raises(LorakernError, match=match):
        train(model, **options)
    assert not any(module._forward_hooks for module in model.modules())


def test_one_adapter_is_no_mixture():
    model = tiny()
    with pytest.raises(LorakernError, match="at least two"):
        train_router(model, adapters(model, 1), DATA, tokenizer=Letters())
