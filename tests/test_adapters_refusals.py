"""Adapter files that must not load: each is refused by LorakernError that names the file, the culprit and a way out."""

import json
import math
import os
import re
import time
import tracemalloc

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from adapter_builders import CONFIG, FACTORS, MODULE, WEIGHTS, entry, refused, write, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakern.adapters import LoraAdapter
from lorakern.errors import LorakernError


def test_what_the_other_tests_change_is_accepted(tmp_path):
    adapter = LoraAdapter.load(write(tmp_path))
    assert adapter["layers.0.proj"].scale == 2.0


FIELDS = {
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["head"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 4], [2, 5]],
    "target_parameters": ["experts.gate_up_proj"],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 4},
    "arrow_config": {"top_k": 2},
    "megatron_config": {"x": 1},
    "bias": "lora_only",
    "peft_type": "LOHA",
    "init_lora_weights": "pissa",
    "a_field_of_peft_9": 0.5,
}
INITS = ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq", "an_init_of_peft_9", 3]
CASES = [*FIELDS.items(), ("bias", "all"), ("peft_type", None), *(("init_lora_weights", init) for init in INITS)]


@pytest.mark.parametrize("field, value", CASES, ids=[f"{field}={value}" for field, value in CASES])
def test_config_that_is_no_plain_delta(tmp_path, field, value):
    message = refused(write(tmp_path, **{field: value}), str(tmp_path / CONFIG), f"{field} = ", repr(value))
    assert re.search(r"merge_and_unload|set |clear|target nn|serve|load each|save|convert", message)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_load(tmp_path, init):
    folder = write(tmp_path, init_lora_weights=init, eva_config={"rho": 2.0}, corda_config={"x": 1}, a_new_field=None)
    adapter = LoraAdapter.load(folder)
    assert adapter.config.rest["init_lora_weights"] == init
    adapter.save(tmp_path / "again")
    fields = [json.loads((path / CONFIG).read_text()) for path in (tmp_path, tmp_path / "again")]
    assert fields[0].items() <= fields[1].items()


BAD_VALUES = [
    ("r", [0, -1, True, 2.0, "2", None, []], "r must be a positive integer"),
    ("lora_alpha", [True, "4", None, math.nan, math.inf, 10**400, [4]], "lora_alpha must be a finite number"),
    ("use_rslora", ["yes", 1, {}], "use_rslora must be true or false"),
    ("fan_in_fan_out", ["no", 0], "fan_in_fan_out must be true or false"),
    ("rank_pattern", [[], 4, "proj"], "rank_pattern must be an object"),
    ("rank_pattern", [{"proj": 2.5}, {"proj": 0}, {"proj": "2"}], "rank_pattern['proj'] must be a positive integer"),
    ("alpha_pattern", [["proj"]], "alpha_pattern must be an object"),
    ("alpha_pattern", [{"proj": None}, {"proj": math.inf}], "alpha_pattern['proj'] must be a finite number"),
    ("target_modules", [4, {"proj": 1}], "target_modules must be a list of strings, a string or null"),
    ("target_modules", [["proj", 4]], "target_modules must hold strings"),
    ("base_model_name_or_path", [4, ["x"]], "base_model_name_or_path must be a string or null"),
    ("task_type", [4], "task_type must be a string or null"),
]


@pytest.mark.parametrize(
    "field, value, says", [(field, value, says) for field, values, says in BAD_VALUES for value in values]
)
def test_config_value_of_a_bad_type(tmp_path, field, value, says):
    refused(write(tmp_path, **{field: value}), str(tmp_path / CONFIG), says, "correct it in the file")


NESTED = "(" * 3000 + ")" * 3000
PATTERNS = [
    "(",
    "*",
    "(?i)proj",
    "(a+)+b",
    "(a|a)*b",
    "(.*)*",
    r"(\w+\.?)+x",
    ".*" * 30,
    "(a|ab)" * 60,
    "a?" * 99,
    NESTED,
]
PATTERNS += ["x" * 20_000, "a{9999999999999}", "((a*){9}){9}b", "(?=(.*.*.*.*.*.*.*.*)*)", ".*a.*a.*a.*a.*b"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=[pattern[:12] for pattern in PATTERNS])
def test_pattern_that_is_invalid_or_could_run_for_ever(tmp_path, field, pattern):
    name = "a" * 900  # PEFT would start and never end on some of these
    tensors = {key.replace("proj", name): tensor for key, tensor in FACTORS.items()}
    folder = write(tmp_path, tensors, target_modules=None, **{field: {pattern: 2}})
    start = time.monotonic()
    refused(folder, str(tmp_path / CONFIG), f"the {field} key", "write module names")
    assert time.monotonic() - start < 10


def test_too_many_patterns(tmp_path):
    folder = write(tmp_path, rank_pattern={f"x{i}": 2 for i in range(30_000)})
    refused(folder, "rank_pattern has 30000 patterns")


@pytest.mark.parametrize(
    "pattern", [r".*layers\.\d+\..*proj", r"layers\.(0|1|2|10)\.(proj|(q|k)_proj)", r"(?:layers\.[\d]{1,}\.){0,2}proj"]
)
def test_everyday_patterns_load(tmp_path, pattern):
    assert LoraAdapter.load(write(tmp_path, alpha_pattern={pattern: 3}))["layers.0.proj"].scale == 1.5


@pytest.mark.parametrize(
    "text, says",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"LORA"', "must be a JSON object"),
        (b'{"peft_type": "LORA", "r": 2, "r": 4}', "the key 'r' twice"),
        (b'{"peft_type": "LORA", "rank_pattern": {"a": 2, "a": 3}}', "the key 'a' twice"),
        (b" " * (5 << 20) + b"{}", "more than the"),
    ],
)
def test_config_that_is_no_object(tmp_path, text, says):
    (write(tmp_path) / CONFIG).write_bytes(text)
    refused(tmp_path, str(tmp_path / CONFIG), says)


def test_config_that_disagrees_with_the_tensors(tmp_path):
    refused(write(tmp_path, r=4), "r and rank_pattern give layers.0.proj rank 4, its tensors have rank 2")
    refused(write(tmp_path, rank_pattern={"proj": 16}), "layers.0.proj rank 16, its tensors have rank 2")
    refused(write(tmp_path, target_modules=["roj", "0"]), "target_modules", "leaves out layers.0.proj")
    for targets in ("all-linear", ".*proj", None, ["layers.0.proj"], ["0.proj"]):
        assert len(LoraAdapter.load(write(tmp_path, target_modules=targets))) == 1


TENSORS = {
    "DoRA": ({f"{MODULE}.lora_magnitude_vector": torch.ones(6)}, "use_dora"),
    "lora_bias": ({f"{MODULE}.lora_B.bias": torch.ones(6)}, "lora_bias"),
    "base bias": ({f"{MODULE}.base_layer.bias": torch.ones(6)}, "bias is not 'none'"),
    "embedding": ({"base_model.model.embed.lora_embedding_A": torch.ones(2, 9)}, "embedding"),
    "tokens": (
        {"base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(2, 9)},
        "trainable_token_ind",
    ),
    "full module": ({"base_model.model.head.weight": torch.ones(6, 9)}, "modules_to_save"),
    "experts": ({"base_model.model.experts.base_layer.lora_A.weight": torch.ones(2, 9)}, "target_parameters"),
    "KaSA": ({f"{MODULE}.lora_diag": torch.ones(2)}, "kasa_config"),
    "VeLoRA": ({f"{MODULE}.lora_velora_embed": torch.ones(2)}, "velora_config"),
    "adapter name": ({f"{MODULE}.lora_A.default.weight": torch.ones(2, 8)}, "adapter name"),
    "no prefix": ({"layers.0.proj.lora_A.weight": torch.ones(2, 8)}, "save the adapter again with PEFT"),
    "no module": ({"base_model.model.lora_A.weight": torch.ones(2, 8)}, "save the adapter again with PEFT"),
    "kohya": ({"lora_unet_proj.lora_down.weight": torch.ones(2, 8)}, "kohya"),
    "odd name": ({"base_model.model.a\n.lora_A.weight": torch.ones(2, 8)}, "printable"),
    "no partner": ({"base_model.model.q.lora_A.weight": torch.ones(2, 8)}, "q has lora_A but no lora_B"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_that_is_no_factor(tmp_path, name):
    tensors, says = TENSORS[name]
    refused(write(tmp_path, FACTORS | tensors, target_modules=None), str(tmp_path / WEIGHTS), says)


def test_factors_that_do_not_fit(tmp_path):
    a, b = FACTORS
    ones = torch.ones
    for A, B, says in [
        (ones(2, 8), ones(6, 3), "differ: 2 and 3"),
        (ones(2, 8, 1, 1), ones(6, 2, 1, 1), "convolution"),
        (ones(2), ones(6, 2), "must be matrices"),
        (ones(0, 8), ones(6, 0), "must not be empty"),
        (ones(2, 0), ones(6, 2), "must not be empty"),
        (ones(2, 8).to(torch.int8), ones(6, 2).to(torch.int8), "dtype 'I8'"),
        (ones(2, 8).to(torch.float8_e4m3fn), ones(6, 2), "dtype 'F8_E4M3'"),
        (ones(2, 8).bool(), ones(6, 2), "dtype 'BOOL'"),
    ]:
        refused(write(tmp_path, {a: A, b: B}), str(tmp_path / WEIGHTS), says)
    save_file({}, tmp_path / WEIGHTS)
    refused(tmp_path, "holds no tensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    tensors = {key: tensor.to(dtype, copy=True) for key, tensor in FACTORS.items()}
    tensors[f"{MODULE}.lora_B.weight"][3, 1] = value
    folder = write(tmp_path, tensors)
    refused(folder, str(tmp_path / WEIGHTS), "lora_B of layers.0.proj has 1 values", "check_finite=False")
    assert not LoraAdapter.load(folder, check_finite=False)["layers.0.proj"].B.isfinite().all()


HEADERS = {
    "hole": ({"a": entry([1], [4, 8])}, 8, "starts at byte 4"),
    "overlap": ({"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, 8, "starts at byte 4"),
    "past the end": ({"a": entry([2**40], [0, 2**42])}, 8, "truncated"),
    "short": ({"a": entry([1], [0, 4])}, 8, "damaged"),
    "shape": ({"a": entry([3], [0, 8])}, 8, "does not take the 8 bytes"),
    "overflow": ({"a": entry([2**62, 2**62], [0, 8])}, 8, "does not take the 8 bytes"),
    "beyond int64": ({"a": entry([2**63], [0, 8])}, 8, "header entry"),
    "too many sizes": ({"a": entry([1] * 9, [0, 4])}, 4, "header entry"),
    "reversed": ({"a": entry([2], [8, 0])}, 8, "does not take the -8 bytes"),
    "negative": ({"a": entry([-2], [0, 8])}, 8, "header entry"),
    "negative twice": ({"a": entry([-1, -2], [0, 8])}, 8, "header entry"),
    "bool": ({"a": entry([True, 2], [0, 8])}, 8, "header entry"),
    "float": ({"a": entry([2.0], [0, 8])}, 8, "header entry"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "header entry"),
    "one field more": ({"a": entry([2], [0, 8]) | {"x": 1}}, 8, "header entry"),
    "no entry": ({"a": 4}, 8, "header entry"),
    "three offsets": ({"a": entry([2], [0, 4, 8])}, 8, "header entry"),
    "dtype": ({"a": entry([2], [0, 8], 4)}, 8, "header entry"),
    "unknown dtype": ({"a": entry([2], [0, 8], "F33")}, 8, "dtype 'F33'"),
    "list": (b"[]", 0, "must be a JSON object"),
    "twice": (b'{"a":{"dtype":"F32"},"a":{}}', 0, "the key 'a' twice"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ of the safetensors header must be an object of strings"),
    "text": (b"hello", 0, "not valid JSON"),
    "deep": (b'{"a":' * 50_000, 0, "not valid JSON"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_lies(tmp_path, name):
    header, size, says = HEADERS[name]
    refused(write_raw(tmp_path, header, bytes(size)), str(tmp_path / WEIGHTS), says)


@pytest.mark.parametrize("length", [64, 2**20, 2**32, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_takes_no_memory(tmp_path, length):
    folder = write_raw(tmp_path, b"{}", length=length)
    tracemalloc.start()
    refused(folder, str(tmp_path / WEIGHTS), f"announce a header of {length}", "truncated")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_header_that_fills_a_huge_file(tmp_path):
    folder = write_raw(tmp_path, b"{}", length=2**36)
    os.truncate(folder / WEIGHTS, 2**37)  # sparse: takes no disk
    refused(folder, "the header has 68719476736 bytes, more than")


def original(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("fuzz"))
    content = (folder / WEIGHTS).read_bytes()
    return folder, content, 8 + int.from_bytes(content[:8], "little")


def loads_unchanged_or_is_refused(folder, content):
    """True if the file loaded; then it must hold what was saved."""
    (folder / WEIGHTS).write_bytes(content)
    try:
        adapter = LoraAdapter.load(folder)
    except LorakernError:
        return False
    assert list(adapter) == ["layers.0.proj"]
    A, B, scale = adapter["layers.0.proj"]
    assert torch.equal(A, torch.ones(2, 8)) and torch.equal(B, torch.ones(6, 2)) and scale == 2.0
    return True


def test_file_cut_at_any_byte(tmp_path_factory):
    folder, content, _ = original(tmp_path_factory)
    for size in range(len(content)):
        assert not loads_unchanged_or_is_refused(folder, content[:size])
    assert loads_unchanged_or_is_refused(folder, content)
    assert not loads_unchanged_or_is_refused(folder, content + b"\0")


def test_any_bit_of_the_header_flipped(tmp_path_factory):
    folder, content, header_end = original(tmp_path_factory)
    loaded = 0
    for position in range(header_end):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            loaded += loads_unchanged_or_is_refused(folder, flipped)
    assert 0 < loaded < 0.1 * 8 * header_end  # those in the metadata change nothing


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_header_bytes_replaced(tmp_path_factory, data):
    folder, content, header_end = original(tmp_path_factory)
    position = data.draw(st.integers(0, header_end - 1))
    piece = data.draw(
        st.binary(min_size=1, max_size=6) | st.sampled_from([b'"', b"{", b"]", b"\\u0000", b"1e9", b"-0"])
    )
    piece = piece[: header_end - position]  # what follows are the tensors, where any bytes are valid
    loads_unchanged_or_is_refused(folder, content[:position] + piece + content[position + len(piece) :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KNOWN_FIELDS = [
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "task_type",
    *FIELDS,
]


@settings(deadline=None, max_examples=100)
@given(fields=st.dictionaries(st.sampled_from(KNOWN_FIELDS) | st.text(max_size=8), JSON, max_size=4))
def test_any_config_loads_or_is_refused(tmp_path_factory, fields):
    folder = write(tmp_path_factory.mktemp("fuzz"), **fields)
    try:
        adapter = LoraAdapter.load(folder)
    except LorakernError:
        return
    alpha = adapter.config.alpha_pattern or {None: adapter.config.lora_alpha}
    assert adapter["layers.0.proj"].scale in {
        value / (math.sqrt(2) if adapter.config.use_rslora else 2)
        for value in [*alpha.values(), adapter.config.lora_alpha]
    }


def test_pickle_files_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(Bomb(), tmp_path / "adapter_model.bin")
    refused(tmp_path, f"no {WEIGHTS}", "adapter_model.bin is not opened", "save_pretrained")
    refused(tmp_path / "adapter_model.bin", "adapter_model.bin: not opened", "save_pretrained")
    # not under another name either
    (tmp_path / "adapter_model.bin").rename(tmp_path / WEIGHTS)
    refused(tmp_path, str(tmp_path / WEIGHTS))
    assert not (tmp_path / "exploded").exists()


def test_paths_that_hold_no_adapter(tmp_path):
    refused(tmp_path / "nothing", "nothing: no such file or directory")
    refused(tmp_path, f"{tmp_path}: there is no {CONFIG} in it", "give the directory")
    write(tmp_path / "poet")
    refused(tmp_path, f"did you mean {tmp_path / 'poet'}?")
    (tmp_path / "poet" / WEIGHTS).unlink()
    refused(tmp_path / "poet", f"there is no {WEIGHTS}", "save or download")
    refused(tmp_path / "poet" / CONFIG, "only a directory or a .safetensors file")
    os.mkfifo(tmp_path / CONFIG)  # would block for ever if it were opened
    refused(tmp_path, f"there is no {CONFIG}")


def test_save_refuses_a_file(tmp_path):
    adapter = LoraAdapter.load(write(tmp_path))
    with pytest.raises(LorakernError, match=f"{WEIGHTS}: this is a file; .* directory"):
        adapter.save(tmp_path / WEIGHTS)
    with pytest.raises(LorakernError, match="cannot be saved"):
        adapter.save(tmp_path / WEIGHTS / "x")
    assert len(LoraAdapter.load(tmp_path)) == 1


A, B = torch.ones(2, 8), torch.ones(6, 2)


@pytest.mark.parametrize(
    "factors, says",
    [
        ({}, "no module"),
        ({"": (A, B, 1)}, "a module path must be"),
        ({3: (A, B, 1)}, "got 3"),
        ({"a\n": (A, B, 1)}, "a module path must be"),
        ({"a" * 1001: (A, B, 1)}, "at most 1000"),
        ({"base_model.model.a": (A, B, 1)}, "without 'base_model.model.'"),
        ({"a": (A, B)}, "a: factors must be a tuple (A, B, scale)"),
        (
            {"a": (A, B.T, 1)},
            "a: the ranks of lora_A (r, d_in) = (2, 8) and lora_B (d_out, r) = (2, 6) differ: 2 and 6",
        ),
        ({"a": (A[:0], B[:, :0], 1)}, "a: lora_A (0, 8) and lora_B (6, 0) must not be empty; leave a module of rank 0"),
        ({"a": (A[0], B, 1)}, "a: A must be a matrix of float16, bfloat16, float32 or float64, got torch.float32 (8,)"),
        (
            {"a": (A, B.int(), 1)},
            "a: B must be a matrix of float16, bfloat16, float32 or float64, got torch.int32 (6, 2)",
        ),
        ({"a": (A, [1], 1)}, "a: B must be a matrix"),
        ({"a": (A, B, math.nan)}, "a: scale must be a number"),
        ({"a": (A, B, "1")}, "a: scale must be a number"),
        ({"a": (A, B, 1e308)}, "scale * rank finite"),
    ],
)
def test_factors_that_no_adapter_can_hold(factors, says):
    with pytest.raises(LorakernError, match=re.escape(says)):
        LoraAdapter(factors)


def test_options_that_no_config_can_hold():
    with pytest.raises(LorakernError, match=r"task_type must be one of .*, got 'POETRY'"):
        LoraAdapter({"a": (A, B, 1)}, task_type="POETRY")
    with pytest.raises(LorakernError, match="base_model_name_or_path must be a string or None, got 3"):
        LoraAdapter({"a": (A, B, 1)}, base_model_name_or_path=3)
