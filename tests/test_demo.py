"""lorakern demo: the whole run on a tiny model, what it says of wrong rows and bad input, and the real model once."""

import io
import json
import shutil

import pytest
import torch

import lorakern as lk

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
rich_console = pytest.importorskip("rich.console")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from lorakern import demo  # noqa: E402
from lorakern.demo import engines as engines_module  # noqa: E402
from lorakern.demo import report  # noqa: E402
from lorakern.demo.requests import (  # noqa: E402
    Request,
    load_adapters,
    load_prompts,
    mixed_batch,
    shipped_adapters,
)
from lorakern.integrations import smollm2  # noqa: E402

RANKS = {"poet": 3, "math": 8, "code": 5}
TARGETS = {"poet": ["self_attn.q_proj", "self_attn.v_proj"], "math": ["mlp.down_proj"], "code": ["self_attn.o_proj"]}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(60))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    config = transformers.LlamaConfig(
        vocab_size=62,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval(), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three random adapters with prompts of unequal length."""
    folder = tmp_path_factory.mktemp("adapters")
    generator = torch.Generator().manual_seed(1)
    shapes = {name: module.weight.shape for name, module in tiny()[0].named_modules() if hasattr(module, "weight")}
    prompts = {}
    for name, rank in RANKS.items():
        factors = {}
        for layer in range(2):
            for target in TARGETS[name]:
                d_out, d_in = shapes[f"model.layers.{layer}.{target}"]
                A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
                factors[f"model.layers.{layer}.{target}"] = (A, B, 0.2)
        lk.LoraAdapter(factors, task_type="CAUSAL_LM").save(folder / name)
        texts = [" ".join(f"w{(7 * i + len(name) * j) % 60}" for i in range(3 + 2 * j)) for j in range(2)]
        prompts[name] = [{"prompt": text, "answer": "w1"} for text in texts]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


def run(folder, **options):
    """The return value of the demo on the tiny model, and what it printed."""
    console = rich_console.Console(file=io.StringIO(), width=160)
    return demo.run(folder, console=console, **options), console.file.getvalue()


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(smollm2, "load", tiny)
    monkeypatch.setattr(engines_module, "NEW_TOKENS", 6)


def test_the_whole_demo(folder, tiny_model, tmp_path):
    json_file, plot_file = tmp_path / "demo.json", tmp_path / "demo.png"
    equal, shown = run(folder, rows=7, repeats=2, json_file=json_file, plot_file=plot_file)
    assert equal
    result = json.loads(json_file.read_text())
    assert [row["adapter"] for row in result["rows"]] == ["code", "math", "poet", "code", "math", "poet", None]
    for row in result["rows"]:
        assert row["equals_peft"] and row["tokens"] == row["peft_tokens"] and 0 < len(row["tokens"]) <= 6
        assert (row["answer"] == row["expected"]) == row["as_expected"]
    # the same prompt is answered with the first adapter and without: the adapters do something
    assert result["rows"][0]["prompt"] == result["rows"][-1]["prompt"]
    assert result["rows"][0]["tokens"] != result["rows"][-1]["tokens"]
    assert list(result["speed"]) == ["float32", "bfloat16"]
    for engines in result["speed"].values():
        assert list(engines) == ["base", "peft", "lorakern"]
        for measured in engines.values():
            assert len(measured["seconds"]) == 2
            assert measured["tokens_per_s"] == pytest.approx(7 * 6 * 2 / sum(measured["seconds"]))
        assert engines["base"]["ratio_to_base"] == 1
    assert result["speed"]["float32"]["lorakern"]["logit_error"] < 1e-5
    assert 1e-4 < result["speed"]["bfloat16"]["lorakern"]["logit_error"] < 0.1
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]
    assert "7 of 7 rows equal PEFT" in shown
    assert "lorakern, mixed batch" in shown and "bfloat16" in shown


def test_a_wrong_row_is_reported_and_nothing_is_timed(folder, tiny_model, tmp_path, monkeypatch):
    """lorakern with a scale that is off: the rows of that adapter differ from PEFT's."""
    wrong = load_adapters(folder)
    factors = {name: (A, B, -3 * scale) for name, (A, B, scale) in wrong["math"].items()}
    wrong["math"] = lk.LoraAdapter(factors)
    monkeypatch.setattr(demo, "load_adapters", lambda folder, names: wrong)
    equal, shown = run(folder, rows=4, json_file=tmp_path / "a.json", plot_file=tmp_path / "a.png")
    assert not equal
    result = json.loads((tmp_path / "a.json").read_text())
    assert [row["equals_peft"] for row in result["rows"]] == [True, False, True, True]
    assert (result["all_rows_equal_peft"], result["speed"]) == (False, {})
    assert "3 of 4 rows equal PEFT" in shown and "DIFFERS" in shown and "tokens/s" not in shown
    assert not (tmp_path / "a.png").exists()


def test_wrong_logits_in_another_dtype_are_not_timed(folder, tiny_model, monkeypatch):
    run_engine = engines_module.Engines.run

    def off(self, engine, call="generate", **options):
        result = run_engine(self, engine, call, **options)
        return result + 1 if engine == "lorakern" and call == "logits" else result

    monkeypatch.setattr(engines_module.Engines, "run", off)
    with pytest.raises(lk.LorakernError, match=r"logits in bfloat16 are .* a wrong result is not timed"):
        run(folder, rows=4, repeats=1, dtypes=["bfloat16"])


def test_replies_end_with_the_end_of_turn(folder):
    model, tokenizer = tiny()
    engines = engines_module.Engines(model, tokenizer, load_adapters(folder), folder, [Request("w1 w2", None, "")])
    assert engines._reply(torch.tensor([5, 6, 1, 0, 0])) == [5, 6, 1]
    assert engines._reply(torch.tensor([5, 6, 0])) == [5, 6, 0]


def test_engines_share_one_set_of_weights(folder):
    model, tokenizer = tiny()
    engines = engines_module.Engines(model, tokenizer, load_adapters(folder), folder, [Request("w1 w2", "poet", "")])
    place = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    peft = engines.peft.base_model.model.model.layers[0].mlp.up_proj.weight
    for other in (engines.base.model, engines.attached.model.model):
        assert other.layers[0].mlp.up_proj.weight.data_ptr() == place
    assert peft.data_ptr() == place
    assert not any(module._forward_hooks for module in [*model.modules(), *engines.base.modules()])


@pytest.mark.parametrize("adapters, rows", [(1, 2), (3, 4), (3, 16), (10, 16)])
def test_mixed_batch_covers_all_adapters_and_the_base(adapters, rows):
    asked = {f"a{i}": [Request(f"{i}/{j}", f"a{i}", "") for j in range(2)] for i in range(adapters)}
    batch = mixed_batch(asked, rows)
    assert len(batch) == rows
    assert {request.adapter for request in batch} == {*asked, None}
    assert sum(request.adapter is None for request in batch) == 1
    with pytest.raises(lk.LorakernError, match=f"rows must be at least {adapters + 1}"):
        mixed_batch(asked, adapters)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "prompts.json is missing"),
        ("{", "is not JSON"),
        ("[]", "has no prompt for adapter 'poet'"),
        ('{"poet": []}', "has no prompt for adapter 'poet'"),
        ('{"poet": ["hello"]}', "adapter 'poet': 'hello' must be one item"),
        ('{"poet": [{"prompt": "w1"}]}', "must be one item"),
    ],
)
def test_bad_prompts_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(lk.LorakernError, match=message):
        load_prompts(tmp_path, ["poet"])


def test_bad_options_are_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype: pytest.fail("the model was loaded"))
    with pytest.raises(lk.LorakernError, match="holds no adapter"):
        run(tmp_path)
    with pytest.raises(lk.LorakernError, match=r"--json .* must be a file in a directory that exists"):
        run(folder, json_file=tmp_path / "nowhere" / "a.json")
    with pytest.raises(lk.LorakernError, match=r"--plot .* must be a file in a directory"):
        run(folder, plot_file=tmp_path)
    with pytest.raises(lk.LorakernError, match="dtype must be one of float32, bfloat16, float16; got 'int8'"):
        run(folder, dtypes=["int8"])


def test_without_a_checkout_the_adapters_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lk, "__file__", str(tmp_path / "lorakern" / "__init__.py"))
    with pytest.raises(lk.LorakernError, match=r"is no checkout of lorakern.* --adapters DIR"):
        shipped_adapters()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(lk.LorakernError, match=r"a\.json cannot be written \(No space left"):
        report._write_beside(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"


def test_the_real_model_on_two_shipped_adapters(tmp_path):
    """SmolLM2 with two adapters and the base: every row equals PEFT's, and the adapters know their answers."""
    shipped = shipped_adapters()
    prompts = load_prompts(shipped, ["clock", "reverse_words"])
    for name in prompts:
        shutil.copytree(shipped / name, tmp_path / name)
    shutil.copy(shipped / "prompts.json", tmp_path)
    equal, shown = run(tmp_path, rows=3, repeats=0)
    assert equal
    assert "2 of 2 answers with an adapter are the expected ones" in shown
    assert "3 of 3 rows equal PEFT" in shown
