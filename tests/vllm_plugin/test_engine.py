"""A real engine with SmolLM2 and the shipped skills: lorakern's answers are those of vLLM's own LoRA path."""

import pytest
from engines import ADAPTERS, TAKES_OVER, generate


@pytest.mark.parametrize("slots, eager", [(len(ADAPTERS) + 1, True), (len(ADAPTERS), False)])
def test_answers_equal_those_of_vllms_own_path(settings, requests, own_answers, tmp_path, slots, eager):
    """Also where the model is compiled, which vLLM does by default, though not with its own LoRA layers."""
    answers, log = generate(tmp_path, requests, True, max_loras=slots, **(settings | {"enforce_eager": eager}))
    assert TAKES_OVER in log
    assert ("CompilationMode.NONE" if eager else "CompilationMode.DYNAMO_TRACE_ONCE") in log
    tokens, ranks = answers["tokens"], answers["ranks"]
    assert tokens == own_answers
    assert all(adapted != bare for adapted, bare in zip(tokens[:6:2], tokens[1:6:2], strict=True))
    # By adapter, in the order of their names, and slice.
    assert ranks["model.layers.3.self_attn.qkv_proj"] == {"1": [4, 0, 32], "2": [4, 4, 4], "3": [8, 8, 8]}
    assert ranks["model.layers.3.self_attn.o_proj"] == {"1": [0], "2": [4], "3": [8]}
    assert ranks["model.layers.3.mlp.gate_up_proj"] == {"1": [0, 0], "2": [4, 4], "3": [0, 0]}
