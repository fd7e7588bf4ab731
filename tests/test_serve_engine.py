"""The server with a real engine: a small model in this process, and `lorakern serve` itself with SmolLM2."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from adapter_builders import CONFIG, WEIGHTS
from mixture_models import LETTERS, Letters, adapters, letters_encoder, tiny
from serve_server import Server, adapter_parts, serving

from lorakern.mixture import LoraRetriever, MixtureModel
from lorakern.serve.template import CHATML, chat_template

ROOT = Path(__file__).resolve().parents[1]
SKILLS = ROOT / "benchmarks" / "skills" / "adapters"
TEXTS = {"a0": ["aaa ab"], "a1": ["bbb ab"], "a2": ["ccc cb"]}


pytestmark = pytest.mark.usefixtures("one_thread")


def engine(**options):
    options = {"k": 2, "max_rows": 3, "max_tokens": 80, "max_loaded": 2} | options
    return MixtureModel(tiny(), LoraRetriever(letters_encoder, instruction=""), tokenizer=Letters(), **options)


def letters(messages):
    return [LETTERS.index(letter) for letter in messages[-1]["content"]]


def files(adapter, folder):
    adapter.save(folder)
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return {name: files(adapter, folder / name) for name, adapter in adapters(tiny()).items()}


def test_answers_are_those_of_the_model(tmp_path, uploads):
    made = adapters(tiny())
    with engine() as model:
        for name in TEXTS:
            model.add(name, made[name], TEXTS[name])
        prompts = ["aab", "bb b", "cab", "cccc c: ccc"]
        expected = {prompt: model.generate([prompt], max_new_tokens=9)[0] for prompt in prompts}
    for restart in (False, True):
        with serving(tmp_path, model := engine(), letters, model.retriever) as server, ThreadPoolExecutor(8) as pool:
            for name in () if restart else TEXTS:
                status, answer = server.upload(adapter_parts(name, TEXTS[name], files=uploads[name]))
                assert status == 201, answer
            work = prompts * 8
            fields = [{"model": "auto", "messages": [{"role": "user", "content": p}], "max_tokens": 9} for p in work]
            for prompt, (status, answer) in zip(work, pool.map(lambda f: server.ask(**f), fields), strict=True):
                assert status == 200, answer
                assert answer["choices"][0]["message"]["content"] == expected[prompt].text
                assert answer["lorakern"]["adapters"] == expected[prompt].adapters
                assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_replaced_while_it_is_asked_for(tmp_path, uploads):
    with serving(tmp_path, model := engine(), letters, model.retriever) as server:
        server.upload(adapter_parts("x", files=uploads["a0"]))
        ask = {"path": "/v1/completions", "model": "x", "prompt": "abc", "max_tokens": 6}
        texts, stop = [server.ask(**ask)[1]["choices"][0]["text"]], threading.Event()
        server.upload(adapter_parts("x", replace="true", files=uploads["a3"]))
        texts.append(server.ask(**ask)[1]["choices"][0]["text"])
        assert texts[0] != texts[1]

        def churn():
            while not stop.is_set():
                for name in ("a0", "a3"):
                    assert server.upload(adapter_parts("x", replace="true", files=uploads[name]))[0] == 201

        with ThreadPoolExecutor(1) as pool:
            churned = pool.submit(churn)
            answers = [server.ask(**ask) for _ in range(60)]
            stop.set()
            churned.result(20)
        assert {status for status, _ in answers} == {200}
        assert {answer["choices"][0]["text"] for _, answer in answers} <= set(texts)
        assert len(list((tmp_path / "adapters").iterdir())) == 1


def test_an_adapter_of_another_model_is_refused(tmp_path):
    with serving(tmp_path, model := engine(), letters, model.retriever) as server:
        status, answer = server.upload(adapter_parts("other"))
        assert status == 422 and "layers.0.proj" in answer["error"]["message"]
        assert server.files() == [] and model.names == []


def test_tokens_are_found_by_words_alone(tmp_path, uploads):
    with serving(tmp_path, model := engine(), letters, model.retriever) as server:
        server.upload(adapter_parts("a0", TEXTS["a0"], files=uploads["a0"]))
        status, answer = server.ask("/v1/completions", model="auto", prompt=[1, 2])
        assert status == 400 and "query" in answer["error"]["message"]


def test_a_model_that_fails_is_told(tmp_path, monkeypatch):
    model = engine()
    with serving(tmp_path, model, letters, model.retriever) as server:
        monkeypatch.setattr(model._engine._packed, "prefill", lambda pieces: 1 / 0)
        ask = {"path": "/v1/completions", "model": "base", "prompt": "abc"}
        assert server.ask(**ask)[0] == 500
        assert server.ask(**ask)[0] == server.call("GET", "/health")[0] == 503


def test_chat_template_is_that_of_the_skills():
    from benchmarks.skills.tasks import format_prompt
    from lorakern.integrations import smollm2

    transformers = pytest.importorskip("transformers")

    path = smollm2.gguf_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    encode = chat_template(tokenizer, CHATML)
    said = [{"role": "user", "content": "Hi"}]
    assert encode(said) == tokenizer(format_prompt("Hi"))["input_ids"]
    said = [{"role": "system", "content": "Be brief."}, *said, {"role": "assistant", "content": "Yes"}, *said]
    whole = "<|im_start|>system\nBe brief.<|im_end|>\n" + format_prompt("Hi") + "Yes<|im_end|>\n" + format_prompt("Hi")
    assert tokenizer.decode(encode(said)) == whole


@pytest.mark.slow
def test_lorakern_serve(tmp_path):
    """The command: a skill is uploaded with the key and answers, and the server ends at a signal."""
    prompts = json.loads((SKILLS / "prompts.json").read_text())["clock"]
    skill = [(SKILLS / "clock" / file).read_bytes() for file in (CONFIG, WEIGHTS)]
    command = [sys.executable, "-m", "lorakern.cli", "serve", "--adapters", str(tmp_path), "--port", "0"]
    environment = os.environ | {"LORAKERN_API_KEY": "s3cret"}
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        line = child.stdout.readline()
        assert line.startswith("0 adapters on http://127.0.0.1:")
        server = Server(int(line.rpartition(":")[2]), tmp_path)
        parts = adapter_parts("clock", ["Convert to 12-hour time: 00:41"], files=skill)
        assert server.upload(parts)[0] == 401
        assert server.upload(parts, {"Authorization": "Bearer s3cret"})[0] == 201
        for item in prompts[:2]:
            said = item["prompt"].removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
            answer = server.ask(model="auto", messages=[{"role": "user", "content": said}], max_tokens=16)[1]
            assert answer["choices"][0]["message"]["content"] == item["answer"]
            assert answer["lorakern"]["adapters"] == {"clock": pytest.approx(1.0)}
        child.send_signal(signal.SIGTERM)
        # as a process that the signal ended
        assert child.wait(30) in (0, -signal.SIGTERM)
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()
