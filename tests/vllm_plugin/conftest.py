"""What tests with engines share: the model, the prompts of the skills, and the answers of vLLM's own LoRA path."""

import pytest
from engines import ADAPTERS, SKILLS, TAKES_OVER, TOKENS, generate, model_folder, questions


@pytest.fixture(scope="session")
def model():
    """SmolLM2 as a directory of Hugging Face files, kept in build/."""
    return model_folder()


@pytest.fixture(scope="session")
def prompts():
    """By skill, as the model reads them."""
    return {skill: [item["prompt"] for item in items] for skill, items in questions().items()}


@pytest.fixture(scope="session")
def settings(model):
    return {
        "model": model,
        "dtype": "float32",
        "enable_lora": True,
        "enforce_eager": True,
        "max_lora_rank": 32,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "seed": 0,
    }


@pytest.fixture(scope="session")
def long_prompt(prompts):
    """Several questions in one."""
    return "".join(prompts["iso_date"][:3])


@pytest.fixture(scope="session")
def requests(prompts, long_prompt):
    """One for each adapter, the same prompts without any, and a longer prompt."""
    asked = [[prompts[name][0], adapter, TOKENS] for name in ADAPTERS for adapter in (str(SKILLS / name), None)]
    return [*asked, [long_prompt, str(SKILLS / "iso_date"), TOKENS]]


@pytest.fixture(scope="session")
def own_answers(settings, requests, tmp_path_factory):
    """Those of vLLM's own LoRA path.

    It serves rows without an adapter with the adapter of the last slot: one slot more than adapters keeps that empty.
    """
    answers, log = generate(tmp_path_factory.mktemp("own"), requests, False, max_loras=len(ADAPTERS) + 1, **settings)
    assert TAKES_OVER not in log and "Using PunicaWrapperCPU." in log
    return answers["tokens"]
