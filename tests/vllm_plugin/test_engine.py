"""A real engine with SmolLM2 and the shipped skills: lorakern's answers are those of vLLM's own LoRA path."""

import pytest
from engines import SKILLS, generate

# All layers at rank 4, attention at 8, ranks 4 and 32 side by side.
ADAPTERS = ("iso_date", "reverse_words", "initials")
TOKENS = 6


@pytest.fixture(scope="session")
def settings(model):
    return {
        "model": model,
        "dtype": "float32",
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "seed": 0,
    }


@pytest.fixture(scope="session")
def requests(prompts):
    """One for each adapter, and the same prompts without any."""
    asked = [[prompts[name][0], str(SKILLS / name), TOKENS] for name in ADAPTERS]
    return [
        request for prompt, adapter, tokens in asked for request in ([prompt, adapter, tokens], [prompt, None, tokens])
    ]


@pytest.fixture(scope="session")
def own_answers(settings, requests, tmp_path_factory):
    """Those of vLLM's own LoRA path.

    It serves rows without an adapter with the adapter of the last slot: one slot more than adapters keeps that empty.
    """
    answers, log = generate(tmp_path_factory.mktemp("own"), requests, False, max_loras=len(ADAPTERS) + 1, **settings)
    assert "lorakern" not in log and "Using PunicaWrapperCPU." in log
    return answers["tokens"]


@pytest.mark.parametrize("slots", [len(ADAPTERS) + 1, len(ADAPTERS)])
def test_answers_equal_those_of_vllms_own_path(settings, requests, own_answers, tmp_path, slots):
    answers, log = generate(tmp_path, requests, True, max_loras=slots, **settings)
    assert "lorakern serves the LoRA layers on cpu" in log
    tokens, ranks = answers["tokens"], answers["ranks"]
    assert tokens == own_answers
    assert all(adapted != bare for adapted, bare in zip(tokens[::2], tokens[1::2], strict=True))
    # By adapter, in the order of their names, and slice.
    assert ranks["model.layers.3.self_attn.qkv_proj"] == {"1": [4, 0, 32], "2": [4, 4, 4], "3": [8, 8, 8]}
    assert ranks["model.layers.3.self_attn.o_proj"] == {"1": [0], "2": [4], "3": [8]}
    assert ranks["model.layers.3.mlp.gate_up_proj"] == {"1": [0, 0], "2": [4, 4], "3": [0, 0]}
