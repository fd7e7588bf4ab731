"""MixtureModel on a small model: answers, reports, adapters that come and go, and requests that fail."""

import threading

import pytest
import torch
from mixture_models import Letters, adapters, letters_encoder, tiny

import lorakern as lk
from lorakern.errors import LorakernError
from lorakern.mixture import LoraRetriever, MixtureModel, Routers
from lorakern.mixture.modes import MODES

TEXTS = {"a0": ["aaa ab"], "a1": ["bbb ab"], "a2": ["ccc cb"], "a3": ["ddd"], "a4": ["eee de"]}
PROMPTS = ["aab", "bb b", "cccc c: ccc", "d", "e, abc def ghi jkl", "cab"]


pytestmark = pytest.mark.usefixtures("one_thread")


def mixture(mode="mixture", retrieve=True, **options):
    model = tiny()
    made = adapters(model)
    if MODES[mode].learned:
        options["routers"] = Routers.init(model, mode, adapters=tuple(made), rank=3, seed=1)
        for name, tensor in options["routers"].parameters().items():
            tensor.mul_(1.0 if name.endswith("/A") else 30.0)
    retriever = LoraRetriever(letters_encoder, instruction="") if retrieve else None
    options = {"max_rows": 3, "max_tokens": 80, **options}
    answering = MixtureModel(model, retriever, tokenizer=Letters(), mode=mode, **options)
    for name, adapter in made.items():
        answering.add(name, adapter, TEXTS[name] if retrieve else None)
    return answering


@pytest.mark.parametrize("mode", MODES)
def test_every_answer_is_that_of_the_prompt_alone(mode):
    with mixture(mode) as model:
        together = model.generate(PROMPTS, max_new_tokens=9)
        assert [model.generate([prompt], max_new_tokens=9)[0] for prompt in PROMPTS] == together
        for answer in together:
            assert len(answer.tokens) == 9 and answer.finish_reason == "length"
            assert len(answer.adapters) == model.k
            if mode != "lora_flow":
                assert sum(answer.adapters.values()) == pytest.approx(1.0, abs=1e-4)
        assert model.stats()["running"] == model.stats()["waiting"] == 0


def test_one_adapter_is_the_model_with_it():
    with mixture(k=2) as model:
        (got,) = model.generate(["abc"], adapters=["a2"], max_new_tokens=8)
    reference = tiny()
    attached = lk.integrations.transformers.attach(reference, adapters(reference))
    tokens = Letters()("abc")["input_ids"]
    with attached.use(["a2"]), torch.no_grad():
        for _ in range(8):
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert got.tokens == tokens[3:] and got.adapters == {"a2": 1.0} and got.prompt_tokens == 3


def test_no_adapter_is_the_base_model():
    with mixture() as model:
        (got,) = model.generate(["abc"], adapters=[()], max_new_tokens=5)
    reference, tokens = tiny(), Letters()("abc")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert got.tokens == tokens[3:] and got.adapters == {}


def test_what_is_retrieved_serves():
    with mixture(k=2) as model:
        answers = model.generate(["aaab", "xyz"], queries=[None, "eeed"], exclude=[None, "a4"])
        assert next(iter(answers[0].adapters)) == "a0"
        assert next(iter(answers[1].adapters)) == "a3" and "a4" not in answers[1].adapters


def test_fewer_slots_than_adapters():
    with mixture(k=2) as model:
        expected = model.generate(PROMPTS, max_new_tokens=6)
    with mixture(k=2, max_loaded=2) as model:
        assert model.generate(PROMPTS, max_new_tokens=6) == expected
        assert model.stats()["loaded"] == 2


def test_adapters_in_files(tmp_path):
    with mixture(k=2) as model:
        expected = model.generate(PROMPTS, max_new_tokens=6)
        for name, adapter in adapters(tiny()).items():
            adapter.save(tmp_path / name)
            model.remove(name)
            model.add(name, tmp_path / name, TEXTS[name])
        assert model.generate(PROMPTS, max_new_tokens=6) == expected


def test_adapters_come_and_go_while_requests_run():
    with mixture(k=2, max_loaded=3) as model:
        expected = {prompt: model.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS}
        extra, stop = adapters(tiny(), seed=9)["a3"], threading.Event()

        def churn():
            i = 0
            while not stop.is_set():
                model.add(f"new{i}", extra)
                ticket = model.submit("abc", adapters=f"new{i}", max_new_tokens=3)
                model.remove(f"new{i}")
                assert len(ticket.result(60).tokens) == 3
                i += 1

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(4):
                for prompt, answer in zip(PROMPTS, model.generate(PROMPTS, max_new_tokens=12), strict=True):
                    assert answer == expected[prompt]
        finally:
            stop.set()
            thread.join()
        assert model.names == list(TEXTS)


def test_an_adapter_that_is_replaced_is_there_at_every_moment():
    made = adapters(tiny())
    with mixture(k=2) as model:
        old, new = (model.generate(["abc"], adapters=[name], max_new_tokens=6)[0].text for name in ("a0", "a3"))
        assert old != new
        with pytest.raises(LorakernError, match="'a0' is there already"):
            model.add("a0", made["a3"])
        stop = threading.Event()

        def churn():
            while not stop.is_set():
                model.add("a0", made["a3"], TEXTS["a0"], replace=True)
                model.add("a0", made["a0"], replace=True)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            texts = {model.submit("abc", adapters="a0", max_new_tokens=6).result(60).text for _ in range(60)}
        finally:
            stop.set()
            thread.join()
        assert texts <= {old, new}
        # the last one came without texts
        assert "a0" not in model.retriever and set(model.names) == set(TEXTS)


def test_a_removed_adapter_stays_with_those_who_have_it_and_no_one_else():
    with mixture(k=1) as model:
        expected = model.generate(["abc"], adapters=["a0"], max_new_tokens=60)
        begun = threading.Event()
        ticket = model.submit("abc", adapters="a0", max_new_tokens=60, on_token=lambda _: begun.set())
        assert begun.wait(60)
        model.remove("a0")
        with pytest.raises(LorakernError, match=r"no adapter 'a0'"):
            model.submit("abc", adapters="a0")
        assert "a0" not in model.generate(["aaa"])[0].adapters
        assert ticket.result(60) == expected[0]


def test_streams_and_stops():
    with mixture() as model:
        pieces = []
        whole = model.submit("abc", max_new_tokens=12, on_token=pieces.append).result(60)
        assert "".join(pieces) == whole.text and len(pieces) > 1
        stop = whole.text[4:6]
        pieces = []
        cut = model.submit("abc", max_new_tokens=12, stop=[stop], on_token=pieces.append).result(60)
        assert cut.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
        assert cut.finish_reason == "stop"


def test_the_end_token_ends():
    with mixture() as model:
        whole = model.generate(["abc"], max_new_tokens=12)[0]
        model._engine._ends = {whole.tokens[3]}
        short = model.generate(["abc"], max_new_tokens=12)[0]
        first = whole.tokens.index(whole.tokens[3])
        assert short.tokens == whole.tokens[:first] and short.finish_reason == "stop"


def test_the_context_ends_an_answer():
    with mixture(max_tokens=12) as model:
        (answer,) = model.generate(["abcdefgh"], max_new_tokens=50)
        assert len(answer.tokens) == 4 and answer.finish_reason == "length"
        with pytest.raises(LorakernError, match="12 tokens"):
            model.submit("abcdefghijkl")


def test_cancelled_requests_leave():
    with mixture() as model:
        tickets = [model.submit("abc", max_new_tokens=70) for _ in range(8)]
        for ticket in tickets[::2]:
            ticket.cancel()
        reasons = [ticket.result(60).finish_reason for ticket in tickets]
        assert "cancelled" not in reasons[1::2]
        assert "cancelled" in reasons[::2]


def test_a_listener_that_fails_harms_no_one_else():
    with mixture() as model:
        expected = model.generate(["bcd"], max_new_tokens=9)[0]

        def broken(_):
            raise RuntimeError("gone")

        first = model.submit("abc", max_new_tokens=60, on_token=broken)
        second = model.submit("bcd", max_new_tokens=9)
        assert second.result(60) == expected and first.result(60).finish_reason == "cancelled"


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_alone(monkeypatch):
    with mixture(k=1) as model:
        load = model.layers.load

        def failing(slot, name, targets):
            if name == "a3":
                raise OSError("disk")
            load(slot, name, targets)

        monkeypatch.setattr(model.layers, "load", failing)
        bad, good = model.submit("abc", adapters="a3"), model.submit("abc", adapters="a0", max_new_tokens=3)
        with pytest.raises(OSError, match="disk"):
            bad.result(60)
        assert len(good.result(60).tokens) == 3
        monkeypatch.setattr(model.layers, "load", load)
        assert model.submit("abc", adapters="a3", max_new_tokens=3).result(60).adapters == {"a3": 1.0}


def test_a_failing_model_fails_every_request(monkeypatch):
    model = mixture()

    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(model._engine._packed, "prefill", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.submit("abc").result(60)
    with pytest.raises(LorakernError, match="closed"):
        model.submit("abc")
    model.close()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.submit(""), "prompt is empty"),
        (lambda m: m.submit([1, 99]), "tokens from 0 to 30"),
        (lambda m: m.submit("abc", max_new_tokens=0), "max_new_tokens"),
        (lambda m: m.submit("abc", adapters=["a0", "a0"]), "different names"),
        (lambda m: m.submit("abc", adapters="nobody"), "no adapter 'nobody'"),
        (lambda m: m.submit([1, 2]), "query is needed"),
        (lambda m: m.submit("abc", stop=[3]), "must be a list of texts"),
        (lambda m: m.generate("abc"), "prompts must be a list"),
        (lambda m: m.generate(["abc"], adapters=["a0", "a1"]), "one for each of the 1 prompts"),
        (lambda m: m.add("a0", adapters(tiny())["a0"]), "'a0' is there already"),
        (lambda m: m.add("b\n", adapters(tiny())["a0"]), "printable"),
        (lambda m: m.add("b", adapters(tiny())["a0"], ["x"], embedding=torch.ones(3)), "both given"),
        (lambda m: m.remove("b"), "no adapter 'b'"),
        (lambda m: m.check("b", lk.LoraAdapter({"x": (torch.ones(1, 2), torch.ones(2, 1), 1.0)})), "no such module"),
    ],
)
def test_bad_requests_are_refused(call, match):
    with mixture() as model:
        with pytest.raises(LorakernError, match=match):
            call(model)
        assert model.names == list(TEXTS) and len(model.generate(["abc"], max_new_tokens=2)[0].tokens) == 2


def test_samples_that_cannot_be_embedded_leave_nothing():
    with mixture() as model:
        with pytest.raises(LorakernError, match="texts is empty"):
            model.add("b", adapters(tiny())["a0"], [])
        assert "b" not in model.names


def test_without_a_retriever():
    with mixture(retrieve=False) as model:
        with pytest.raises(LorakernError, match="no retriever"):
            model.submit("abc")
        with pytest.raises(LorakernError, match="need a retriever"):
            model.add("b", adapters(tiny())["a0"], ["x"])
        assert model.submit("abc", adapters="a1", max_new_tokens=2).result(60).adapters == {"a1": 1.0}


@pytest.mark.parametrize(
    ("options", "match"),
    [({"k": 0}, "k must be"), ({"k": 3, "max_loaded": 2}, "max_loaded is 2"), ({"mode": "soup"}, "mode must be")],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(LorakernError, match=match):
        MixtureModel(tiny(), None, tokenizer=Letters(), **options)
