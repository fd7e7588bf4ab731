"""The OpenAI-compatible server with SmolLM2 and the shipped skills: every answer is that of the same request alone."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from adapters import ACCEPTED, DAMAGE, change_config, damaged, derive
from engines import SKILLS, questions
from server import BASE, Request, serving
from soak import Soak

SLOTS, KEPT, MAX_RANK = 3, 4, 32
TOKENS = 10


@pytest.fixture(scope="module")
def server(model, prompts, tmp_path_factory):
    """More skills than slots, and than adapters that are kept in memory: half of them named at the start."""
    skills = sorted(prompts)
    settings = {"max-loras": SLOTS, "max-cpu-loras": KEPT, "max-lora-rank": MAX_RANK, "block-size": 32}
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    arguments += ["--lora-modules", *(f"{skill}={SKILLS / skill}" for skill in skills[::2])]
    with serving(model, tmp_path_factory.mktemp("server"), *arguments) as server:
        for skill in skills[1::2]:
            assert server.load(skill, SKILLS / skill).status_code == 200
        yield server


@pytest.fixture(scope="module")
def alone(server):
    """The answer to a request that has the server for itself."""
    answers = {}

    def ask(request):
        if request not in answers:
            wait_until_idle(server)
            answers[request] = server.answer(request)
        return answers[request]

    return ask


@pytest.fixture(scope="module")
def few(prompts):
    """As many adapters as slots, and the base model."""
    skills = sorted(prompts)[:SLOTS]
    return [Request(name, prompts[skills[0]][0], TOKENS) for name in (*skills, BASE)]


def wait_until_idle(server):
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        time.sleep(0.1)


def together(server, requests):
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(server.answer, requests))


@contextlib.contextmanager
def traffic(server, requests, alone):
    """Ask all of them again and again, at the same time, while the block runs; every answer is checked."""
    expected, stop, answered = [alone(request) for request in requests], threading.Event(), threading.Semaphore(0)

    def repeat(request):
        answers = []
        while not stop.is_set():
            try:
                answers.append(server.answer(request))
            finally:
                answered.release()
        return answers

    with ThreadPoolExecutor(len(requests)) as pool:
        clients = [pool.submit(repeat, request) for request in requests]
        try:
            for _ in clients:
                answered.acquire()
            yield
        finally:
            stop.set()
    for client, answer in zip(clients, expected, strict=True):
        answers = client.result()
        assert answers == [answer] * len(answers)


def test_log_says_that_lorakern_serves(server):
    assert "lorakern serves the LoRA layers on cpu" in server.log()


def test_skills_of_the_start_and_of_run_time_answer_as_trained(server, prompts):
    assert server.names() == {BASE, *prompts}
    for skill, (item, *_) in questions().items():
        body = {"model": skill, "prompt": item["prompt"], "max_tokens": 32, "temperature": 0}
        text = server.post("/v1/completions", **body).raise_for_status().json()["choices"][0]["text"]
        assert text.strip() == item["answer"]


def test_ten_adapters_and_none_at_once_in_three_slots(server, prompts, alone):
    names = (BASE, *prompts)
    requests = [Request(name, prompts["roman"][0], TOKENS) for name in names]
    expected = [alone(request) for request in requests]
    assert len(set(map(tuple, expected))) == len(names)
    # only a part of such a prompt fits into a step
    long = [Request(name, "".join(prompts["initials"]), TOKENS) for name in names[:4]]
    requests, expected = requests + long, expected + [alone(request) for request in long]
    for order in (requests, requests[::-1]):
        answers = dict(zip(order, together(server, order), strict=True))
        assert [answers[request] for request in requests] == expected


def test_load_and_unload_while_others_run(server, few, prompts, alone, tmp_path):
    folder = derive("roman", tmp_path / "louder", strength=1.5)
    request = Request("come and go", prompts["roman"][1], TOKENS)
    answers = []
    with traffic(server, few, alone):
        for _ in range(3):
            assert server.load(request.adapter, folder).status_code == 200
            assert server.load(request.adapter, folder).status_code == 400  # the name is taken
            answers.append(server.answer(request))
            assert server.unload(request.adapter).status_code == 200
            assert_unknown(server, request)
    assert server.load(request.adapter, folder).status_code == 200
    assert answers == [alone(request)] * 3
    assert server.unload(request.adapter).status_code == 200


def test_unloaded_under_a_running_request(server, few, prompts, alone):
    request = Request("roman", prompts["roman"][1], 32)
    expected, others, names = alone(request), [alone(other) for other in few], server.names()
    running = server.stream(request)
    answer = [next(running)]
    assert server.unload("roman").status_code == 200
    assert_unknown(server, request)
    assert together(server, few) == others
    answer += running
    assert answer == expected
    assert server.load("roman", SKILLS / "roman").status_code == 200
    assert server.names() == names
    assert server.answer(request) == expected


def assert_unknown(server, request):
    response = server.ask(request)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFoundError"


def test_unknown_adapter(server, few, alone, tmp_path):
    with traffic(server, few, alone):
        for _ in range(3):
            assert_unknown(server, Request("nobody", "Hello", 1))
            assert server.unload("nobody").status_code == 404
            assert server.load("nobody", tmp_path / "nowhere").status_code == 404
            assert server.load(BASE, SKILLS / "roman").status_code == 400


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapter_is_refused_and_harms_no_other(server, few, alone, tmp_path, damage):
    folder = damaged(damage, tmp_path / "damaged")
    expected, names = [alone(request) for request in few], server.names()
    for _ in range(2):
        response = server.load("damaged", folder)
        assert response.status_code in (404, 500)
        assert response.json()["error"]["message"]
    assert server.names() == names
    assert not (folder / "executed").exists()
    assert_unknown(server, few[0]._replace(adapter="damaged"))
    assert together(server, few) == expected


@pytest.mark.parametrize("damage", ACCEPTED)
def test_damaged_adapter_that_vllm_accepts_harms_no_other(server, few, alone, tmp_path, damage):
    """vLLM copies factors that are too small into the slot's corner."""
    folder = damaged(damage, tmp_path / "damaged")
    expected = [alone(request) for request in few]
    assert server.load("damaged", folder).status_code == 200
    request = few[0]._replace(adapter="damaged")
    assert len(server.answer(request)) == request.tokens
    assert together(server, few) == expected
    assert server.unload("damaged").status_code == 200
    assert_unknown(server, request)


@pytest.mark.parametrize("told", [64, 4])
def test_rank_above_the_maximum(server, few, alone, tmp_path, told):
    folder = derive("clock", tmp_path / "wide", rank=64)
    change_config(folder, r=told)
    expected = [alone(request) for request in few]
    response = server.load("wide", folder)
    assert response.status_code == 500
    assert f"{MAX_RANK}" in response.json()["error"]["message"]
    assert_unknown(server, few[0]._replace(adapter="wide"))
    assert together(server, few) == expected


@pytest.mark.parametrize("versions", [("iso_date", "initials"), ("initials", "iso_date")])
@pytest.mark.parametrize("in_place", [False, True])
def test_two_versions_under_one_name(server, prompts, alone, versions, in_place):
    """Ranks 4 and 32 follow each other; cached prefixes of the first version do not serve the second."""
    prompt = "".join(prompts["initials"])
    name = f"versions of {versions[0]} {in_place}"
    old, new = (alone(Request(version, prompt, TOKENS)) for version in versions)
    assert old != new
    cached = server.metric("vllm:prefix_cache_hits_total")
    assert server.load(name, SKILLS / versions[0]).status_code == 200
    for _ in range(2):
        assert server.answer(Request(name, prompt, TOKENS)) == old
    assert server.metric("vllm:prefix_cache_hits_total") > cached
    if not in_place:
        assert server.unload(name).status_code == 200
    assert server.load(name, SKILLS / versions[1], load_inplace=in_place).status_code == 200
    for _ in range(2):
        assert server.answer(Request(name, prompt, TOKENS)) == new
    assert server.unload(name).status_code == 200


def test_cancelled_requests(server, few, prompts, alone):
    long = [Request(name, prompts["clock"][1], 200) for name in ("clock", "email", BASE)]
    begun = [alone(request._replace(tokens=4)) for request in long]
    wait_until_idle(server)
    generated = server.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(len(long)) as pool:
        parts = list(pool.map(server.answer_in_part, long, [4] * len(long)))
    assert parts == begun
    assert together(server, few) == [alone(request) for request in few]
    wait_until_idle(server)
    asked = sum(request.tokens for request in (*long, *few))
    assert server.metric("vllm:generation_tokens_total") - generated < asked


def test_soak_in_short(server, tmp_path):
    """`make soak-vllm` is the whole of it."""
    soak = Soak(server, tmp_path, adapters=7, seed=1)
    figures = soak.run(requests=60, clients=8)
    assert not soak.failures
    assert figures["equal"] + figures["cancelled"] == 60
    assert min(figures[name] for name in ("cancelled", "reloads", "passing", "refused loads")) > 0
