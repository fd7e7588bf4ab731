"""AdapterWriter: what it writes, what PEFT makes of it, and what is left when it fails, is killed, or is not alone."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from adapter_builders import CONFIG, WEIGHTS, Chain, assert_same, factors, small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorakern.adapters import AdapterWriter, LoraAdapter, open_adapter
from lorakern.errors import LorakernError

A, B = torch.ones(2, 8), torch.ones(6, 2)


def write_all(path, modules, **options):
    with AdapterWriter(path, **options) as writer:
        for module, value in modules.items():
            writer.add(module, value)
    return writer


MODULE = st.none() | st.tuples(
    st.integers(1, 9),
    st.one_of(st.sampled_from([0.0, 0.5, 1 / 3, 1.0, 16 / 7, -2.0]), st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)


@settings(deadline=None, max_examples=40)
@given(
    modules=st.tuples(*[MODULE] * 4).filter(any),
    use_rslora=st.booleans(),
    fan_in_fan_out=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_ranks_scales_and_dtypes_come_back_here_and_in_peft(
    tmp_path_factory, modules, use_rslora, fan_in_fan_out, seed
):
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    given_factors = {
        name: factors(module[0], d_in, d_out, module[1], module[2], seed + i)
        for i, ((name, d_in, d_out), module) in enumerate(zip(Chain.SHAPES, modules, strict=True))
        if module
    }
    write_all(
        folder, given_factors, use_rslora=use_rslora, fan_in_fan_out=fan_in_fan_out, base_model_name_or_path="my/model"
    )

    loaded = LoraAdapter.load(folder)
    assert list(loaded) == list(given_factors)
    for name, (a, b, scale) in given_factors.items():
        assert torch.equal(loaded[name].A, a) and loaded[name].A.dtype == a.dtype
        assert torch.equal(loaded[name].B, b) and loaded[name].B.dtype == b.dtype
        assert loaded[name].scale == pytest.approx(scale, rel=2.3e-16, abs=0)
        assert loaded[name].A.data_ptr() % a.element_size() == 0
    config = json.loads((folder / CONFIG).read_text())
    assert (config["fan_in_fan_out"], config["use_rslora"]) == (fan_in_fan_out, use_rslora)
    assert config["base_model_name_or_path"] == "my/model" and config["target_modules"] == list(given_factors)

    # for nn.Linear PEFT sets fan_in_fan_out to False by itself, with a warning
    model = peft.PeftModel.from_pretrained(Chain().double(), folder, autocast_adapter_dtype=False)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(given_factors)
    for name, (a, b, _) in given_factors.items():
        assert layers[name].scaling["default"] == loaded[name].scale
        assert torch.equal(layers[name].lora_A["default"].weight, a.double())
        assert torch.equal(layers[name].lora_B["default"].weight, b.double())
    dense = Chain().double()
    for name, (a, b, scale) in loaded.items():
        dense.get_submodule(name).weight.data += scale * b.double() @ a.double()
    x = torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = model(x), dense(x)
    assert (theirs - ours).norm() <= 1e-9 * ours.norm()


def test_config_of_another_adapter_is_kept_or_refused(tmp_path):
    fields = dict(r=3, lora_alpha=5, use_rslora=True, alpha_pattern={"b": 2}, target_modules="a|b", peft_type="LORA")
    write_all(tmp_path, {"a": factors(3, 8, 6, 5 / 3**0.5), "b": factors(3, 8, 6, 2 / 3**0.5)})
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"eva_config": {"rho": 2.0}}))
    adapter = LoraAdapter.load(tmp_path)
    with AdapterWriter(tmp_path / "again") as writer:
        writer.config = adapter.config
        for module, value in adapter.items():
            writer.add(module, value)
    assert_same(LoraAdapter.load(tmp_path / "again"), adapter)
    assert fields.items() <= json.loads((tmp_path / "again" / CONFIG).read_text()).items()
    for module, value, says in [
        ("a", factors(4, 8, 6, 1.0), "r and rank_pattern give a rank 3, its tensors have rank 4"),
        ("b", factors(3, 8, 6, 1.0), f"the config gives b the scale {2 / 3**0.5}, its factors came with 1.0"),
    ]:
        with pytest.raises(LorakernError, match=says), AdapterWriter(tmp_path / "bad") as writer:
            writer.config = adapter.config
            writer.add(module, value)
        assert not (tmp_path / "bad").exists()


def test_tensors_lie_aligned_and_modules_keep_their_order(tmp_path):
    dtypes = [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    modules = {f"z{9 - i}.proj": factors(3, 5, 7, 1.0, dtype) for i, dtype in enumerate(dtypes)}
    write_all(tmp_path, modules)
    content = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    assert list(LoraAdapter.load(tmp_path)) == list(modules)
    theirs = load_file(tmp_path / WEIGHTS)
    for name, (a, b, _) in modules.items():
        assert torch.equal(theirs[f"base_model.model.{name}.lora_A.weight"], a)
        assert torch.equal(theirs[f"base_model.model.{name}.lora_B.weight"], b)


def test_a_writer_may_replace_what_it_reads(tmp_path):
    small(2.0).save(tmp_path)
    with open_adapter(tmp_path) as adapter, AdapterWriter(tmp_path) as writer:
        for module, (a, b, scale) in adapter.items():
            writer.add(module, (a * 2, b, scale))
        assert_same(LoraAdapter.load(tmp_path), small(2.0))
    assert LoraAdapter.load(tmp_path)["layers.1.proj"].A.eq(4).all()


def test_card_and_config(tmp_path):
    (tmp_path / "README.md").write_text("of old")
    small().save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "of old"
    with AdapterWriter(tmp_path, task_type="CAUSAL_LM") as writer:
        writer.add("a", (A, B, 0.5))
        writer.card = "# Mögen"
        assert (tmp_path / "README.md").read_text() == "of old"
    assert (tmp_path / "README.md").read_bytes() == "# Mögen".encode()
    assert writer.config == LoraAdapter.load(tmp_path).config and writer.config.task_type == "CAUSAL_LM"
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS]


def test_made_folders_go_when_writing_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), AdapterWriter(tmp_path / "a" / "b") as writer:
        writer.add("a", (A, B, 1))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


NAN = torch.full((2, 8), torch.nan)
BAD_ADDS = {
    "nothing": ([], "no module was added"),
    "twice": ([("a", (A, B, 1)), ("a", (A, B, 1))], "a was added already"),
    "NaN": ([("a", (NAN, B, 1))], "lora_A of a has 16 values that are NaN or infinite"),
    "inf": ([("a", (A, B * torch.inf, 1))], "lora_B of a has 12 values that are NaN or infinite"),
    "shape": ([("a", (A, B.T, 1))], "a: the ranks of"),
    "integers": ([("a", (A.int(), B, 1))], "a: A must be a matrix of float16"),
    "rank 0": ([("a", (A[:0], B[:, :0], 1))], "must not be empty"),
    "scale": ([("a", (A, B, float("inf")))], "a: scale must be a number"),
    "no tuple": ([("a", A[0, 0])], "factors must be a tuple"),
    "path": ([("../a", (A, B, 1))], "a module path must be"),
    "slash": ([("a/b", (A, B, 1))], "without 'base_model.model.', slashes and empty parts"),
    "backslash": ([("a\\b", (A, B, 1))], "a module path must be"),
    "empty part": ([("a..b", (A, B, 1))], "a module path must be"),
    "second one": ([("a", (A, B, 1)), ("b", (NAN, B, 1))], "lora_A of b"),
}


@pytest.mark.parametrize("name", BAD_ADDS)
def test_what_cannot_be_added_leaves_the_old_adapter(tmp_path, name):
    adds, says = BAD_ADDS[name]
    small(3.0).save(tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LorakernError) as error, AdapterWriter(tmp_path, card="new") as writer:
        for module, value in adds:
            writer.add(module, value)
    assert says in str(error.value)
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"task_type": "POETRY"}, "task_type must be one of"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string"),
        ({"card": 3}, "card must be text"),
        ({"card": "\ud800"}, "card must be text"),
    ],
)
def test_bad_options_leave_the_old_adapter(tmp_path, options, says):
    small(3.0).save(tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LorakernError, match=says):
        write_all(tmp_path, {"a": (A, B, 1)}, **options)
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_what_is_in_the_way(tmp_path):
    writer = AdapterWriter(tmp_path / "out")
    with pytest.raises(LorakernError, match="with block"):
        writer.add("a", (A, B, 1))
    (tmp_path / "file").write_text("")
    with pytest.raises(LorakernError, match="this is a file"):
        write_all(tmp_path / "file", {"a": (A, B, 1)})
    with pytest.raises(LorakernError, match="cannot be saved"):
        write_all(tmp_path / "file" / "out", {"a": (A, B, 1)})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(LorakernError, match="cannot be saved"):
        write_all(tmp_path / "loop", {"a": (A, B, 1)})
    for name in (CONFIG, WEIGHTS, "README.md"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(LorakernError, match=f"{name}: this is a directory"):
            write_all(tmp_path / name, {"a": (A, B, 1)})
        assert os.listdir(tmp_path / name) == [name]


def test_a_link_in_the_folder_is_replaced_not_followed(tmp_path):
    small(1.0).save(tmp_path / "shared")
    small(1.0).save(tmp_path / "out")
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).symlink_to(tmp_path / "shared" / name)
    assert_same(LoraAdapter.load(tmp_path / "out"), small(1.0))
    small(2.0).save(tmp_path / "out")
    assert_same(LoraAdapter.load(tmp_path / "out"), small(2.0))
    assert_same(LoraAdapter.load(tmp_path / "shared"), small(1.0))


def test_disk_full_leaves_the_old_adapter(tmp_path, monkeypatch):
    small(1.0).save(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LorakernError, match=r"cannot be saved \(\[Errno 28\] No space left on device\)"):
        small(2.0).save(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    assert_same(LoraAdapter.load(tmp_path), small(1.0))


def test_two_writers_at_once(tmp_path):
    with AdapterWriter(tmp_path) as first:
        first.add("a", (A, B, 1))
        with pytest.raises(LorakernError, match="another writer is at work"):
            small().save(tmp_path)
        first.add("b", (A, B, 1))
    assert list(LoraAdapter.load(tmp_path)) == ["a", "b"]
    small().save(tmp_path)
    assert_same(LoraAdapter.load(tmp_path), small())


def test_only_leftovers_of_writers_are_removed(tmp_path):
    token = "0123456789abcdef"
    mine = [f".lorakern-{token}-{name}.tmp" for name in ("data", WEIGHTS, f"old.{CONFIG}")]
    other = [".hidden.tmp", ".lorakern-x-data.tmp", f"lorakern-{token}-data.tmp", f".lorakern-{token}-data.tmp.bak"]
    for name in mine + other:
        (tmp_path / name).write_text(name)
    small().save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*other, CONFIG, WEIGHTS])


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """There a running writer looks like a dead one, so nothing of another one is removed."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    left = f".lorakern-{16 * 'a'}-data.tmp"
    (tmp_path / left).touch()
    monkeypatch.setattr("fcntl.flock", flock)
    if number == errno.EIO:
        with pytest.raises(LorakernError, match="cannot be saved"):
            small().save(tmp_path)
        assert os.listdir(tmp_path) == [left]
    else:
        small().save(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([left, CONFIG, WEIGHTS])


def killed(function):
    """Run `function` in a child that ends by SIGKILL; it kills itself or raises AssertionError."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def state(folder):
    """The fill of the adapter in `folder`, or None where a config is missing; anything else fails."""
    try:
        adapter = LoraAdapter.load(folder)
    except LorakernError as error:
        assert f"there is no {CONFIG} in it" in str(error)
        return None
    fill = float(adapter["layers.0.proj"].A[0, 0])
    assert_same(adapter, small(fill))
    return fill


@pytest.mark.parametrize("with_old", [False, True])
def test_killed_at_every_step(tmp_path, with_old):
    """kill -9 before each write, sync and rename: the old adapter, none, or the new one, in this order."""
    states = []
    for step in range(99):
        folder = tmp_path / str(step)
        if with_old:
            small(1.0).save(folder)
        calls = 0

        def count(function, step=step):
            def wrapper(*args, **kwargs):
                nonlocal calls
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return function(*args, **kwargs)

            return wrapper

        def save(folder=folder, count=count):
            Path.replace = count(Path.replace)
            Path.unlink = count(Path.unlink)
            os.fsync = count(os.fsync)
            small(2.0).save(folder)
            os.kill(os.getpid(), signal.SIGKILL)

        killed(save)
        states.append(state(folder))
        leftovers = [name for name in os.listdir(folder) if name.startswith(".")]
        if not leftovers:
            break
        small(3.0).save(folder)
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
        assert state(folder) == 3.0
    assert not leftovers and len(states) > 8
    old = 1.0 if with_old else None
    order = [old, None, 2.0]
    assert states == sorted(states, key=order.index) and states[0] == old and states[-1] == 2.0 and None in states


def test_killed_at_any_time(tmp_path):
    """kill -9 from outside while one adapter after the other is written."""
    small(1.0).save(tmp_path)
    seen = set()
    chance = random.Random(0)
    for _ in range(40):
        child = os.fork()
        if not child:
            try:
                for fill in range(2, 10_000):
                    small(float(fill)).save(tmp_path)
            finally:
                os._exit(1)
        time.sleep(chance.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        seen.add(state(tmp_path))
    assert len(seen) > 2
    small(1.0).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS] and state(tmp_path) == 1.0


MEMORY = """
    import sys, torch
    from pathlib import Path
    from lorakern.adapters import AdapterWriter, open_adapter

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def write(folder, count):
        with AdapterWriter(folder) as writer:
            for i in range(count):
                writer.add(f"layers.{i}.proj", (torch.full((128, 6144), float(i)), torch.ones(6144, 128), 1.0))

    def read(folder):
        with open_adapter(folder) as adapter:
            return sum(float(A[0, 0]) * scale for A, B, scale in adapter.values())

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    write(folder / "warm", 2), read(folder / "warm")
    before = peak()
    write(folder / "large", 64)
    written = peak()
    assert read(folder / "large") == sum(range(64))
    print((folder / "large" / "adapter_model.safetensors").stat().st_size / 2**20, written - before, peak() - written)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_a_few_modules(tmp_path):
    script = textwrap.dedent(MEMORY)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    size, writing, reading = map(float, done.stdout.split())
    assert size > 380 and writing < 40 and reading < 40, done.stdout
