"""train_router on a small model: it learns, resumes to the bit, and leaves the model as it was."""

import pytest
import torch
from mixture_models import Letters, adapters, tiny

from lorakern.errors import LorakernError
from lorakern.merge._batches import Batches
from lorakern.mixture import Routers, train_router
from lorakern.mixture.modes import MODES
from lorakern.mixture.router_start import read_differences
from lorakern.mixture.router_training import _Run

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
    whole, losses = train(empty=2)

    class Stop(Exception):
        pass

    def stop(done, steps, loss):
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        train(state=tmp_path, save_every=3, progress=stop, empty=2)
    again, more = train(state=tmp_path, empty=2)
    assert more == losses
    for name, tensor in whole.parameters().items():
        assert torch.equal(tensor, again.parameters()[name])
    with pytest.raises(LorakernError, match="other lr"):
        train(state=tmp_path, lr=0.01, empty=2)


def test_the_router_starts_to_read_what_tells_examples_apart():
    model, batches = tiny(), Batches("test", DATA, Letters(), 4, 64)
    inputs = []
    layer = model.model.layers[1].self_attn.v_proj
    hook = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0].double().mean(1)))
    for batch in batches.epoch():
        model(batch["input_ids"])
    hook.remove()
    x = torch.cat(inputs)
    drawn, found = (Routers.init(model, "ramole", rank=8) for _ in range(2))
    read_differences(model.train(), found, batches.epoch())
    assert model.training and not any(module._forward_hooks for module in model.modules())
    path = "model.layers.1.self_attn.v_proj"
    A = found.layers[path]["A"].double()
    apart = x - x.mean(0)
    assert len(x) == len(DATA) == 6
    # five differences of six examples, one of which may lie along the mean
    assert (A[:5] @ x.mean(0)).abs().max() < 1e-5
    torch.testing.assert_close((apart @ A[:5].T).square().mean(0), torch.ones(5).double(), rtol=1e-4, atol=0)
    assert torch.equal(A[5:].float(), drawn.layers[path]["A"][5:])
    assert torch.equal(found.layers[path]["B"], drawn.layers[path]["B"])


def test_examples_that_are_alike_leave_the_router_as_it_was_drawn():
    model, batches = tiny(), Batches("test", DATA[:1] * 4, Letters(), 2, 64)
    drawn, found = (Routers.init(model, "ramole", rank=3) for _ in range(2))
    read_differences(model, found, batches.epoch())
    assert all(torch.equal(tensor, drawn.parameters()[name]) for name, tensor in found.parameters().items())


def test_an_empty_adapter_takes_its_share_and_adds_nothing():
    model, made = tiny(), adapters(tiny(), 2)
    routers = Routers.init(model, "ramole")
    for router in routers.layers.values():
        router["B"].zero_()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.ones(2, 4, dtype=torch.int64)}
    outputs = []
    for empty in (0, 2):
        run = _Run(model, made, routers, 0.0, empty, 0)
        tokens = run._tokens(batch, 0)
        assert tokens.indices.shape == (8, 2 + empty) and (tokens.indices >= 0).all()
        layer = model.model.layers[0].self_attn.q_proj
        x = torch.linspace(-1, 1, 8 * layer.in_features).view(8, -1)
        with torch.no_grad():
            plain = layer(x)
            with run.layers.run(tokens):
                outputs.append(layer(x) - plain)
        run.close()
    # gates of 1/2 each, and of 1/4
    torch.testing.assert_close(outputs[0], 2 * outputs[1], rtol=1e-5, atol=1e-6)
    assert outputs[1].abs().max() > 0.01


def test_dropout_leaves_two():
    model = tiny()
    made = adapters(model, 4)
    run = _Run(model, made, Routers.init(model, "ramole"), 0.6, 0, 0)
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
        ({"empty": -1}, "empty must be"),
        ({"empty": 1, "mode": "mole"}, "empty is for mode 'ramole'"),
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
