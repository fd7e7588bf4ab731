"""Over 200 files that are no good LoRA: each ends in a LorakernError, soon, in little memory, with OUT untouched.

What single fields of a config may hold, and what each kind of adapter is told, is in test_adapters_refusals.py.
"""

import json
import math
import os
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from adapter_builders import CONFIG, FACTORS, MODULE, WEIGHTS, entry, factors, safetensors_bytes, small, write
from safetensors.torch import save, save_file

from lorakern.adapters import AdapterWriter, LoraAdapter, check_same_base, open_adapter
from lorakern.errors import LorakernError

ones = torch.ones
STYLE = "style.safetensors"  # a single file without a config: kohya's or diffusers'
PEFT_KEYS = (f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight")
KOHYA_KEYS = ("lora_unet_proj.lora_down.weight", "lora_unet_proj.lora_up.weight")
CASES = {}


def case(name, build):
    """`build` puts the input into a folder, and returns what is to be loaded if that is not the folder."""
    assert name not in CASES
    CASES[name] = build


def both(name, tensors):
    """The same tensors as a PEFT adapter and as a single file; `tensors` gets the two factors' keys."""
    case(f"{name}, PEFT", lambda folder: write(folder, tensors(*PEFT_KEYS), target_modules=None))
    case(f"{name}, kohya", lambda folder: styled(folder, save(tensors(*KOHYA_KEYS))))


def raw(name, header, data=b"", length=None):
    """A file of these bytes, beside a good config and without one."""
    content = safetensors_bytes(header, data, length)
    case(f"{name}, PEFT", lambda folder: weighted(folder, content))
    case(f"{name}, kohya", lambda folder: styled(folder, content))


def styled(folder, content):
    (folder / STYLE).write_bytes(content)
    return folder / STYLE


def weighted(folder, content):
    (write(folder) / WEIGHTS).write_bytes(content)


def configured(folder, content):
    (write(folder) / CONFIG).write_bytes(content)


def peft_bytes():
    return save(FACTORS, metadata={"format": "pt"})


def kohya_bytes(alpha=1.0, **metadata):
    a, b, _ = factors(2, 8, 6, 1.0)
    alphas = {} if alpha is None else {"lora_unet_proj.alpha": torch.as_tensor(alpha)}
    return save(dict(zip(KOHYA_KEYS, (a, b), strict=True)) | alphas, metadata=metadata or None)


GOOD_CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"]}).encode()


# Cut short, or longer than it was
for tenth in range(10):
    part = tenth / 10
    case(f"weights cut at {part}", lambda f, part=part: weighted(f, peft_bytes()[: int(part * len(peft_bytes()))]))
    case(f"kohya cut at {part}", lambda f, part=part: styled(f, kohya_bytes()[: int(part * len(kohya_bytes()))]))
    case(f"config cut at {part}", lambda f, part=part: configured(f, GOOD_CONFIG[: int(part * len(GOOD_CONFIG))]))
case("weights with a byte more", lambda f: weighted(f, peft_bytes() + b"\0"))
case("kohya with a byte more", lambda f: styled(f, kohya_bytes() + b"\0"))
case("config with a byte more", lambda f: configured(f, GOOD_CONFIG + b"}"))
case("config twice", lambda f: configured(f, GOOD_CONFIG * 2))

# Headers: their length, their text
for length in (0, 1, 7, 8, 2**16, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
    raw(f"header of {length}", b"{}", length=length)
TEXTS = {
    "nothing": b"",
    "spaces": b" " * 64,
    "null": b"null",
    "number": b"1e400",
    "string": b'"{}"',
    "list": b"[{}]",
    "word": b"hello",
    "Latin-1": '{"ü": 1}'.encode("latin-1"),
    "UTF-16": "{}".encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "overlong": b'{"\xc0\xaf": {}}',
    "half a surrogate": b'{"\xed\xa0\x80": {}}',
    "zeros": bytes(64),
    "control character": b'{"a\x01": {}}',
    "deep list": b'{"a":' + b"[" * 100_000,
    "deep list, closed": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge integer": b'{"a": ' + b"9" * 10_000 + b"}",
    "duplicate": b'{"a": 1, "a": 1}',
    "duplicate, escaped": b'{"a": 1, "\\u0061": 1}',
    "duplicate inside": b'{"a": {"dtype": "F32", "dtype": "F32"}}',
    "comment": b"{} // nothing",
    "single quotes": b"{'a': 1}",
}
for name, text in TEXTS.items():
    raw(f"header: {name}", text)
    case(f"config: {name}", lambda folder, text=text: configured(folder, text))
raw("header of no tensors", {})
raw("header with metadata only", {"__metadata__": {"format": "pt"}})
raw("metadata: a list", {"__metadata__": []})
raw("metadata: a number inside", {"__metadata__": {"a": 1}})


def layout(name, *entries, size):
    """Two tensors with keys of LoRA factors, placed so."""
    for kind, keys in (("PEFT", PEFT_KEYS), ("kohya", KOHYA_KEYS)):
        content = safetensors_bytes(dict(zip(keys, entries, strict=True)), bytes(size))
        case(f"layout: {name}, {kind}", lambda f, kind=kind, c=content: (weighted if kind == "PEFT" else styled)(f, c))


a, b = [2, 8], [6, 2]  # 64 and 48 bytes
layout("overlap", entry(a, [0, 64]), entry(b, [60, 108]), size=108)
layout("same place", entry(a, [0, 64]), entry([8, 2], [0, 64]), size=64)
layout("hole", entry(a, [0, 64]), entry(b, [68, 116]), size=116)
layout("hole before", entry(a, [4, 68]), entry(b, [68, 116]), size=116)
layout("past the end", entry(a, [0, 64]), entry(b, [64, 112]), size=100)
layout("reversed", entry(a, [64, 0]), entry(b, [64, 112]), size=112)
layout("negative", entry(a, [-64, 0]), entry(b, [0, 48]), size=48)
layout("too few bytes", entry(a, [0, 60]), entry(b, [60, 108]), size=108)
layout("wrapping sizes", entry([2**62, 8], [0, 0]), entry(b, [0, 48]), size=48)
layout("sizes of 2**64", entry([2**64, 2**64], [0, 64]), entry(b, [64, 112]), size=112)
layout("a terabyte", entry([2, 2**37], [0, 2**40]), entry(b, [2**40, 2**40 + 48]), size=112)
layout("all of int64", entry([2, 2**60], [0, 2**63 - 8]), entry(b, [0, 48]), size=48)
layout("many sizes", entry([1] * 100_000, [0, 4]), entry(b, [4, 52]), size=52)
layout("sizes of 2**62", entry([2**62] * 8, [0, 64]), entry(b, [64, 112]), size=112)
layout("floats", entry([2.0, 8.0], [0, 64]), entry(b, [64, 112]), size=112)
layout("strings", entry(["2", "8"], [0, 64]), entry(b, [64, 112]), size=112)
layout("null", entry(None, [0, 64]), entry(b, [64, 112]), size=112)
layout("no object", [0, 64], entry(b, [64, 112]), size=112)

# Factors: dtypes, shapes, values, missing ones
for dtype in ("I8", "U8", "BOOL", "I16", "I64", "U64", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "float32", ""):
    layout(f"dtype {dtype}", entry(a, [0, 64], dtype), entry(b, [64, 112]), size=112)
SHAPES = {
    "vectors": ((2,), (2,)),
    "numbers": ((), ()),
    "three sizes": ((1, 2, 8), (1, 6, 2)),
    "1x1 convolution": ((2, 8, 1, 1), (6, 2, 1, 1)),
    "3x3 convolution": ((2, 8, 3, 3), (6, 2, 1, 1)),
    "swapped": ((6, 2), (2, 8)),
    "other rank": ((2, 8), (6, 3)),
    "rank 0": ((0, 8), (6, 0)),
    "no inputs": ((2, 0), (6, 2)),
    "no outputs": ((2, 8), (0, 2)),
}
for name, (shape_a, shape_b) in SHAPES.items():
    both(f"shape: {name}", lambda x, y, s=shape_a, t=shape_b: {x: ones(s), y: ones(t)})
for value in (math.nan, math.inf, -math.inf):
    for place in (0, -1):
        for factor in (0, 1):

            def poisoned(*keys, value=value, place=place, factor=factor):
                tensors = {keys[0]: ones(2, 8), keys[1]: ones(6, 2)}
                tensors[keys[factor]].view(-1)[place] = value
                return tensors

            both(f"{value} at {place} of {'AB'[factor]}", poisoned)
both("no B", lambda x, y: {x: ones(2, 8)})
both("no A", lambda x, y: {y: ones(6, 2)})
both("a second module without B", lambda x, y: {x: ones(2, 8), y: ones(6, 2), x.replace("proj", "q"): ones(2, 8)})
case("A twice", lambda f: styled(f, save({k: ones(2, 8) for k in ("unet.q.lora_A.weight", "unet.q.lora_down.weight")})))

# Module names that are paths, or that a terminal would not show
NAMES = [
    "..",
    "../x",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a/../b",
    "a\\b",
    "C:\\x",
    "a..b",
    ".a",
    "a.",
    " a",
    "a ",
]
NAMES += ["a\nb", "a\0b", "a\x1b[2J", "\u202ea", "\u200ba", "x" * 2000, "file:///etc/passwd", "~/.ssh/id"]
for name in NAMES:
    shown = ascii(name)[:30]
    case(
        f"module {shown}, PEFT",
        lambda f, n=name: write(f, {k.replace("layers.0.proj", n): v for k, v in FACTORS.items()}, target_modules=None),
    )
    case(
        f"module {shown}, diffusers",
        lambda f, n=name: styled(
            f, save({f"unet.{n}.lora_A.weight": ones(2, 8), f"unet.{n}.lora_B.weight": ones(6, 2)})
        ),
    )
SURROGATE = {
    PEFT_KEYS[0].replace("proj", "\ud800"): entry(a, [0, 64]),
    PEFT_KEYS[1].replace("proj", "\ud800"): entry(b, [64, 112]),
}
case("module '\\ud800', PEFT", lambda f: weighted(f, safetensors_bytes(SURROGATE, bytes(112))))
case("the prefix twice", lambda f: write(f, {f"base_model.model.{k}": v for k, v in FACTORS.items()}))
case("target_modules that are paths", lambda f: write(f, target_modules=["../../etc/passwd", "/proj"]))


# Far larger on paper than on the disk
def sparse(file, size, start=b""):
    file.write_bytes(start)
    os.truncate(file, size)


def sparse_tensor(folder):
    keys = dict(zip(PEFT_KEYS, (entry([2, 2**36], [0, 2**39]), entry(b, [2**39, 2**39 + 48])), strict=True))
    head = safetensors_bytes(keys)
    sparse(write(folder) / WEIGHTS, len(head) + 2**39 + 48, head)


def large_header(folder):
    weighted(folder, safetensors_bytes(b"{}" + b" " * (33 << 20)))


case("sparse file with a tensor of half a terabyte", sparse_tensor)
case("sparse file with a header of 64 GB", lambda f: sparse(write(f) / WEIGHTS, 2**37, (2**36).to_bytes(8, "little")))
case("sparse file of a terabyte", lambda f: sparse(write(f) / WEIGHTS, 2**40))
case("sparse config of a terabyte", lambda f: sparse(write(f) / CONFIG, 2**40, GOOD_CONFIG))
case("header of 33 MB", large_header)
case("config of 5 MB", lambda f: configured(f, GOOD_CONFIG + b" " * (5 << 20)))

# No LoRA, or not only
NOT_LORA = {
    "a model": "model.layers.0.self_attn.q_proj.weight",
    "an image model": "model.diffusion_model.input_blocks.0.0.weight",
    "no component": "proj.lora_down.weight",
    "unknown component": "vae.proj.lora_A.weight",
    "an optimizer": "optimizer.state.0.exp_avg",
    "textual inversion": "emb_params",
    "bundled embeddings": "bundle_emb.token.string_to_param.*",
    "DoRA": "lora_unet_proj.dora_scale",
    "LoHa": "lora_unet_proj.hada_w1_a",
    "LoKr": "lora_unet_proj.lokr_w1",
    "OFT": "lora_unet_proj.oft_blocks",
    "full difference": "lora_unet_proj.diff",
    "bias difference": "diffusion_model.proj.diff_b",
    "bias": "transformer.proj.lora_B.bias",
    "Tucker convolution": "lora_unet_proj.lora_mid.weight",
    "old diffusers": "unet.proj.processor.to_q_lora.down.weight",
    "older diffusers": "unet.proj.lora.down.weight",
    "adapter name": "transformer.proj.lora_A.default.weight",
    "IA3": "unet.proj.ia3_l",
    "no module": "unet.lora_A.weight",
    "no flat module": "lora_unet_.lora_down.weight",
}
for name, key in NOT_LORA.items():
    case(f"not LoRA: {name}, alone", lambda f, key=key: styled(f, save({key: ones(6, 2)})))
    case(
        f"not LoRA: {name}, beside LoRA",
        lambda f, key=key: styled(
            f, save(dict(zip(KOHYA_KEYS, (ones(2, 8), ones(6, 2)), strict=True)) | {key: ones(4)})
        ),
    )
    case(f"not LoRA: {name}, PEFT", lambda f, key=key: write(f, FACTORS | {key: ones(6, 2)}))
case("PEFT without its config", lambda f: styled(f, peft_bytes()))

# Alphas
for value in (math.nan, math.inf, -math.inf, 0.0, [1.0, 2.0], [], [[1.0, 1.0]]):
    case(f"alpha {value}", lambda f, v=value: styled(f, kohya_bytes(torch.tensor(v))))
for dtype in (torch.bool, torch.int8, torch.uint8, torch.complex64):
    case(f"alpha of {dtype}", lambda f, dtype=dtype: styled(f, kohya_bytes(torch.tensor(1).to(dtype))))
case("alpha without factors", lambda f: styled(f, save({"lora_unet_proj.alpha": torch.tensor(1.0)})))
case("alpha in a PEFT file", lambda f: write(f, FACTORS | {f"{MODULE}.alpha": torch.tensor(1.0)}))
for name, text in TEXTS.items():
    if "\ufffd" not in text.decode("utf-8", "replace") and "surrogate" not in name:
        case(
            f"metadata: {name}", lambda f, text=text: styled(f, kohya_bytes(None, lora_adapter_metadata=text.decode()))
        )
case("metadata beside alphas", lambda f: styled(f, kohya_bytes(1.0, lora_adapter_metadata="{}")))
case("metadata of no component", lambda f: styled(f, kohya_bytes(None, lora_adapter_metadata='{"unet.r": 2}')))


# Pickle files
def pickled(folder, name):
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    return folder / name


for suffix in ("bin", "pt", "pth", "ckpt", "pkl"):
    case(f"pickle .{suffix}", lambda f, suffix=suffix: pickled(f, f"adapter_model.{suffix}"))


def only_pickle(folder):
    (write(folder) / WEIGHTS).rename(folder / "adapter_model.bin")


case("pickle in place of the weights", only_pickle)
for protocol in range(6):
    content = pickle.dumps(list(range(100)), protocol)
    case(f"pickle {protocol} under another name, PEFT", lambda f, c=content: weighted(f, c))
    case(f"pickle {protocol} under another name, kohya", lambda f, c=content: styled(f, c))


# What is no file, or no folder
def instead(name, put):
    """A good adapter, one of whose files is something else."""

    def build(folder):
        (write(folder) / name).unlink()
        put(folder / name)

    return build


for name in (CONFIG, WEIGHTS):
    case(f"{name}: missing", instead(name, lambda file: None))
    case(f"{name}: a directory", instead(name, lambda file: file.mkdir()))
    case(f"{name}: a link to itself", instead(name, lambda file: file.symlink_to(file)))
    case(f"{name}: a link to nothing", instead(name, lambda file: file.symlink_to("nowhere")))
    case(f"{name}: a link to its folder", instead(name, lambda file: file.symlink_to(file.parent)))
    case(f"{name}: /dev/zero", instead(name, lambda file: file.symlink_to("/dev/zero")))
    case(f"{name}: a pipe", instead(name, lambda file: os.mkfifo(file)))
    case(f"{name}: empty", instead(name, lambda file: file.touch()))


def linked(target):
    def build(folder):
        (folder / STYLE).symlink_to(target)
        return folder / STYLE

    return build


case("no such folder", lambda f: f / "nothing")
case("an empty folder", lambda f: f)
case("a path with a zero byte", lambda f: f / "a\0b")
case("a name too long", lambda f: f / ("x" * 10_000))
case("a folder called .safetensors", lambda f: (f / STYLE).mkdir() or f / STYLE)
case("a file in the place of a folder", lambda f: (f / "x").touch() or f / "x" / WEIGHTS)
case("a link to itself", linked(STYLE))
case("a link to nothing", linked("nowhere"))
case("a link to /dev/zero", linked("/dev/zero"))
case("a text file", lambda f: (f / "README.md").write_text("x") and f / "README.md")
case("the config itself", lambda f: write(f) / CONFIG)

# Patterns that a backtracking matcher would not finish, on names made for them
for pattern in (
    r"(\w|xx)*!",
    "(x*)*$",
    "(?:x|xx)*y",
    "x*x*x*x*x*x*x*x*x*y",
    r"(a)?(?(1)(.*)*|b)",
    "(?P<n>(x+)+)(?P=n)*y",
):
    for field in ("rank_pattern", "alpha_pattern"):
        long = {k.replace("proj", "x" * 900): v for k, v in FACTORS.items()}
        fields = {"target_modules": None, field: {pattern: 2}}
        case(f"{field} {pattern}", lambda f, long=long, fields=fields: write(f, long, **fields))


def mixed(folder):
    """Two adapters that are fine, but not together."""
    for name in ("one", "two"):
        write(folder / name, base_model_name_or_path=f"base/{name}")
    return [folder / "one", folder / "two"]


case("mixed base models", mixed)

opened_files = None


def audit(event, arguments):
    if event == "open" and opened_files is not None:
        opened_files.append(str(arguments[0]))


sys.addaudithook(audit)


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened from Python during the test."""
    monkeypatch.setattr(sys.modules[__name__], "opened_files", [])
    return opened_files


def copy(path, out):
    """As a merge does it: everything is read while OUT is being written."""
    paths = path if isinstance(path, list) else [path]
    with AdapterWriter(out) as writer:
        adapters = [open_adapter(path) for path in paths]
        check_same_base(adapters)
        for module, value in adapters[0].items():
            writer.add(module, value)


def snapshot(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def test_there_are_200():
    assert len(CASES) >= 200


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    small().save(out)
    (out / "README.md").write_text("of old")
    return out


@pytest.mark.parametrize("name", CASES)
def test_refused_soon_and_out_is_untouched(tmp_path, out, opened, name):
    folder = tmp_path / "in"
    folder.mkdir()
    path = CASES[name](folder)
    path = path if isinstance(path, (Path, list)) else folder
    before = snapshot(out)
    opened.clear()
    if Path("/proc/self/clear_refs").exists():
        reset_peak()
        held = peak()
    start = time.monotonic()
    with pytest.raises(LorakernError) as error:
        copy(path, out)
    if not isinstance(path, list):
        with pytest.raises(LorakernError):
            LoraAdapter.load(path)
    # the bound is for a hang: how long it takes is not tested here
    assert time.monotonic() - start < 10
    if Path("/proc/self/clear_refs").exists():
        assert peak() - held < 64 << 20
    message = str(error.value)
    assert str(tmp_path) in message and len(message) < 1500 + 2 * len(str(path))
    assert snapshot(out) == before
    assert not [file for file in opened if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]


def test_the_inputs_that_are_changed_are_good(tmp_path):
    for name, build in {
        "PEFT": lambda f: weighted(f, peft_bytes()),
        "config": lambda f: configured(f, GOOD_CONFIG),
        "kohya": lambda f: styled(f, kohya_bytes()),
    }.items():
        (tmp_path / name).mkdir()
        path = build(tmp_path / name) or tmp_path / name
        assert len(LoraAdapter.load(path)) == 1


def test_paths_in_a_config_are_only_strings(tmp_path, opened):
    """A base model's name goes from file to file, and is never looked up."""
    for base in ("../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "~/x", "https://example.org/x", "a\0b"):
        folder = write(tmp_path / "in", base_model_name_or_path=base, revision="../x")
        opened.clear()
        adapter = LoraAdapter.load(folder)
        adapter.save(tmp_path / "out")
        assert LoraAdapter.load(tmp_path / "out").config.base_model_name_or_path == base
        assert all(str(tmp_path) in file for file in opened)


def test_a_pickle_is_not_opened_even_to_look(tmp_path, opened):
    for name in ("adapter_model.bin", "x.pt"):
        save_file({"a": ones(1)}, tmp_path / name)
    opened.clear()
    for path in (tmp_path / "adapter_model.bin", tmp_path / "x.pt", tmp_path):
        with pytest.raises(LorakernError):
            LoraAdapter.load(path)
    assert opened == []
