"""IterIS: what it takes and refuses, samples in every form, and sweeps on disk."""

import json

import pytest
import torch
from iteris_problems import Problem
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorakern as lk
from lorakern.merge import iteris
from lorakern.merge.iteris.state import FILE


def solve(problem, **options):
    return iteris.solve(problem.model, problem.adapters, problem.samples, **options)


def assert_same(solution, other):
    assert list(solution.updates) == list(other.updates)
    assert all(torch.equal(solution.updates[name], other.updates[name]) for name in other.updates)
    assert solution.module_objectives == other.module_objectives and solution.lambdas == other.lambdas
    assert solution.undetermined == other.undetermined


class Killed(BaseException):
    pass


@pytest.mark.parametrize("limit", [3, 5, 7, 8])
def test_a_killed_run_goes_on_after_its_last_sweep_to_the_same_bits(tmp_path, limit):
    problem = Problem()
    whole = solve(problem, iterations=3)
    calls = []

    def kill(done, total, what):
        calls.append((done, total, what))
        if len(calls) == limit:
            raise Killed

    with pytest.raises(Killed):
        solve(problem, iterations=3, state=tmp_path, progress=kill)
    done_sweeps = (limit - 1) // 2
    (tmp_path / f".{FILE}.tmp").write_bytes(b"half of a file")
    again = []
    resumed = solve(problem, iterations=3, state=tmp_path, progress=lambda *call: again.append(call))
    assert_same(resumed, whole)
    assert len(again) == 8 - 2 * done_sweeps == again[0][1]
    assert_same(solve(problem, iterations=3, state=tmp_path, progress=pytest.fail), whole)
    assert_same(solve(problem, iterations=5, state=tmp_path), solve(problem, iterations=5))
    with pytest.raises(lk.LorakernError, match="has 5 sweeps already, iterations is 3"):
        solve(problem, iterations=3, state=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("what", ["alpha", "coefficients", "model", "adapters", "samples"])
def test_a_state_of_other_arguments_is_refused(tmp_path, what):
    problem, other, options = Problem(), Problem(), {}
    solve(problem, iterations=1, state=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    if what == "alpha":
        options = {"alpha": 0.25}
    elif what == "coefficients":
        options = {"coefficients": [1, 2]}
    elif what == "model":
        other.model[2].bias.data[0] += 1
    elif what == "adapters":
        other.adapters[1]["4"].B[0, 0] += 1
    else:
        other.samples[1][0][0, 0] += 1
    with pytest.raises(lk.LorakernError, match=f"other {what} .*another state folder"):
        solve(other, iterations=2, state=tmp_path, **options)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_damaged_state_is_refused(tmp_path):
    problem, file = Problem(), tmp_path / FILE
    solve(problem, iterations=1, state=tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    with pytest.raises(lk.LorakernError, match=r"cannot be read.*remove"):
        solve(problem, iterations=1, state=tmp_path)
    file.write_bytes(content)
    tensors = load_file(file)
    for metadata, says in ((None, "holds no state"), ({"lorakern.iteris": "{}"}, "lacks sweeps")):
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(lk.LorakernError, match=says):
            solve(problem, iterations=1, state=tmp_path)


def test_the_last_good_sweep_survives_features_that_are_not_finite(tmp_path):
    problem = Problem()
    good = solve(problem, iterations=2)
    solve(problem, iterations=1, state=tmp_path)
    calls = []

    def explode(module, inputs, output):
        calls.append(module)
        return output * float("inf") if len(calls) > 7 else output

    handle = problem.model[3].register_forward_hook(explode)
    with pytest.raises(lk.LorakernError, match="module '4' under 'adapter 1' hold NaN or infinity"):
        solve(problem, iterations=3, state=tmp_path)
    handle.remove()
    assert_same(solve(problem, iterations=2, state=tmp_path), good)


BAD = {
    "iterations": (0, 1.5, True),
    "batch_size": (0,),
    "max_length": (-1,),
    "max_memory": (0, "1"),
    "alpha": (-1.0, float("nan"), "1"),
    "ratio": (1.0, -0.1),
    "lambda_source": ("both", 1),
    "target": ("weight", None),
    "coefficients": ([1.0], [1.0, -1.0], [0.0, 0.0], 2.0, "12"),
    "model": (None,),
    "samples": ([], [[]], "ab", None, [[torch.ones(1, 7)], []]),
    "adapters": ([], {}, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_named(name, value):
    problem = Problem()
    arguments = {"model": problem.model, "adapters": problem.adapters, "samples": problem.samples} | {name: value}
    with pytest.raises(lk.LorakernError, match=name):
        iteris.solve(arguments.pop("model"), arguments.pop("adapters"), arguments.pop("samples"), **arguments)


def once():
    yield torch.ones(2, 7)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (once(), "generator.*only once"),
        (torch.ones(2, 7), "got Tensor.*into a list"),
        ({"input_ids": torch.ones(2, 7)}, "one batch goes into a list"),
        ([], "is empty"),
        (["a text"], "tokenizer"),
        ([3], "batch 0 must be a tensor or a dict"),
        ([{}], "batch 0 must be a tensor or a dict"),
        (7, "must be a list of texts"),
        ("no/such/file.jsonl", "cannot be read.*path of a JSONL file"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_samples_that_cannot_be_used_are_refused(source, says):
    problem = Problem()
    with pytest.raises(lk.LorakernError, match=rf"samples\[1\].*{says}"):
        iteris.solve(problem.model, problem.adapters, [problem.samples[0], source])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2: it must be a text"),
        ('{"prompt": "a"}\n', "line 1: it must be a text"),
        ("[1]\n", "line 1 must be a record"),
        ('\n{"text"\n', "line 2 is not valid JSON"),
    ],
)
def test_jsonl_files_that_cannot_be_used_are_refused(tmp_path, text, says):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    problem = Problem()
    with pytest.raises(lk.LorakernError, match=says):
        iteris.solve(problem.model, problem.adapters, [problem.samples[0], file])


def test_adapters_that_do_not_fit_are_refused():
    problem = Problem()
    good = problem.adapters[0]
    A, B, scale = good["2"]
    for bad, says in (
        ({"9": good["2"]}, "adapter 1.*no such module"),
        ({"2": (A[:, :-1], B, scale)}, "adapter 1; their base models differ"),
        ({"2": (A, B, float("nan"))}, "adapter 1.*scale"),
        ({"2": (A * float("inf"), B, scale)}, "2: A of adapter 1 holds NaN"),
        ({}, "adapter 1 has no modules"),
    ):
        problem.adapters[1] = bad
        with pytest.raises(lk.LorakernError, match=says):
            solve(problem)


def test_a_layer_that_does_not_run_is_named():
    problem = Problem()
    problem.model[0].add_module("unused", torch.nn.Linear(7, 9))
    problem.adapters[0]["0.unused"] = problem.adapters[0]["0"]
    with pytest.raises(lk.LorakernError, match=r"'0.unused' does not run"):
        solve(problem)


class Moody(torch.nn.Module):
    """Runs its second layer as often as the first number of the batch says."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)

    def forward(self, x):
        y = self.a(x)
        for _ in range(int(x[0, 0])):
            y = self.b(y)
        return y


def test_layers_may_run_often_but_as_often_in_all_batches():
    model, g = Moody(), torch.Generator().manual_seed(0)
    A, B, scale = torch.randn(2, 7, generator=g), torch.randn(7, 2, generator=g), 0.1
    adapters = [{"a": (A, B, scale), "b": (B.T, A.T, scale)}]
    x = torch.randn(40, 7, generator=g)
    x[0, 0] = 3.0
    solution = iteris.solve(model, adapters, [[x, x]], iterations=2)
    assert torch.allclose(solution.updates["b"], scale * A.T @ B.T, atol=1e-3)
    other = x.clone()
    other[0, 0] = 2.0
    with pytest.raises(lk.LorakernError, match=r"'b' runs 3 times in one batch and 2 times"):
        iteris.solve(model, adapters, [[x, other]], iterations=2)


def test_regmean_takes_no_iterations():
    problem = Problem()
    with pytest.raises(lk.LorakernError, match="takes no iterations"):
        iteris.regmean(problem.model, problem.adapters, problem.samples, iterations=2)


def test_the_state_can_be_read_by_others(tmp_path):
    problem = Problem()
    solution = solve(problem, iterations=1, state=tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        fields = json.loads(file.metadata()["lorakern.iteris"])
        assert all(torch.equal(file.get_tensor(name), solution.updates[name]) for name in problem.names)
    assert fields["objectives"] == solution.module_objectives and fields["arguments"]["alpha"] == 1e-5
