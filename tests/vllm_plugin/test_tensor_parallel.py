"""Two-way tensor parallel, plain and fully sharded, and LoRA of the embedding and the head: answers are the same."""

import pytest
import torch
from engines import TAKES_OVER, run, tokens
from random_llama import LINEAR, VOCABULARY, save_adapter, save_model

R_MAX = 32
# Rank and layers of each adapter, in the order of their names.
ADAPTERS = {
    "a": (4, LINEAR),
    "b": (12, ("q_proj", "v_proj", "down_proj")),
    "c": (32, LINEAR),
    "d": (8, ("embed_tokens", "lm_head", "o_proj")),
    "e": (16, ("embed_tokens",)),
    "f": (20, ("lm_head",)),
}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(VOCABULARY, (21,), generator=generator).tolist()
    adapters = [
        save_adapter(folder / name, rank, seed, layers) for seed, (name, (rank, layers)) in enumerate(ADAPTERS.items())
    ]
    return [[[prompt, adapter, 10] for adapter in (*adapters, None)]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enable_lora": True,
        "enforce_eager": True,
        "max_loras": len(ADAPTERS) + 1,
        "max_lora_rank": R_MAX,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "seed": 0,
    }


@pytest.fixture(scope="module")
def own_answers(settings, rounds, tmp_path_factory):
    """Those of vLLM's own LoRA path in one process; see conftest.py for the number of slots."""
    answers, log = run(tmp_path_factory.mktemp("own"), rounds, False, **settings)
    assert TAKES_OVER not in log
    own = tokens(answers["rounds"][0])
    assert len(set(map(tuple, own))) == len(own)
    return own


def expected_ranks(workers, worker, fully_sharded):
    """By layer and adapter, the ranks of A in every slice that a worker holds."""
    slices = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    ranks = {}
    for layer in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        # Fully sharded, layers that are split by columns share out the rows of A, padding included.
        shared = fully_sharded and layer in slices
        share = R_MAX // workers if shared else R_MAX
        first = worker * share if shared else 0
        ranks[layer] = {
            str(number): [max(0, min(share, rank - first)) if s in layers else 0 for s in slices.get(layer, (layer,))]
            for number, (rank, layers) in enumerate(ADAPTERS.values(), 1)
        }
    return ranks


@pytest.mark.parametrize(
    ("workers", "fully_sharded"), [(1, False), (2, False), (2, True)], ids=["one", "two", "two, fully sharded"]
)
def test_answers_equal_those_of_vllms_own_path(settings, rounds, own_answers, tmp_path, workers, fully_sharded):
    parallel, environment = {}, {}
    if workers == 2:
        parallel = {
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
            "fully_sharded_loras": fully_sharded,
        }
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    # What is padding to a worker is never read either: the second round is served with NaN there.
    rounds = [*rounds, "poison", "forget", *rounds]
    answers, log = run(tmp_path, rounds, True, environment, **parallel, **settings)
    assert log.count(TAKES_OVER) == workers
    for served in answers["rounds"]:
        assert tokens(served) == own_answers
    assert len(answers["ranks"]) == workers and min(answers["poisoned"]) > 0
    for worker, ranks in enumerate(answers["ranks"]):
        for layer, expected in expected_ranks(workers, worker, fully_sharded).items():
            part = "self_attn" if layer in ("qkv_proj", "o_proj") else "mlp"
            assert ranks[f"model.layers.1.{part}.{layer}"] == expected
