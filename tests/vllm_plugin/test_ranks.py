"""Slots of rank 64 hold adapters of ranks 4 to 32: each is measured, and what is padding is never read."""

import json

import pytest
from engines import ADAPTERS, SKILLS, TAKES_OVER, TOKENS, run, tokens
from safetensors.torch import load_file, save_file

PADDED = 16  # the stated rank of an adapter whose last ranks are zero
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """iso_date, of rank 4, stated to be of rank 16."""
    source, folder = SKILLS / "iso_date", tmp_path_factory.mktemp("padded") / "zz_padded"
    folder.mkdir()
    factors = load_file(source / "adapter_model.safetensors")
    for name, factor in factors.items():
        shape = (PADDED, factor.shape[1]) if "lora_A" in name else (factor.shape[0], PADDED)
        wide = factor.new_zeros(shape)
        wide[: factor.shape[0], : factor.shape[1]] = factor
        factors[name] = wide
    save_file(factors, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"r": PADDED, "lora_alpha": config["lora_alpha"] * PADDED // config["r"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def served(settings, prompts, requests, padded, tmp_path_factory):
    """Twice: before and after NaN was written to what is padding."""
    asked = [*requests, [prompts["iso_date"][0], str(padded), TOKENS]]
    engine = settings | {"max_lora_rank": 64, "max_loras": len(ADAPTERS) + 1, "enable_prefix_caching": False}
    answers, log = run(tmp_path_factory.mktemp("served"), [asked, "poison", asked], True, **engine)
    assert TAKES_OVER in log
    return answers


def test_answers_equal_those_of_vllms_own_path_at_rank_32(served, own_answers):
    before, _ = map(tokens, served["rounds"])
    assert before[:-1] == own_answers
    assert before[-1] == own_answers[0]


def test_padding_is_never_read(served):
    before, after = map(tokens, served["rounds"])
    # Most of the slots: ranks 4 to 32 of 64, and layers that an adapter leaves alone.
    assert served["poisoned"][0] > 0.8 * served["slots"][0] / 4
    assert after == before


def test_ranks_are_the_true_ones(served, padded):
    """Those of the files, in every layer and slice."""
    expected = {}
    for directory in (*(SKILLS / adapter for adapter in ADAPTERS), padded):
        factors = load_file(directory / "adapter_model.safetensors")
        # A holds zeros from where the true rank ends.
        ranks = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): int(a.any(1).nonzero()[-1]) + 1
            for name, a in factors.items()
            if "lora_A" in name
        }
        expected[str(served["adapters"][directory.name])] = ranks
    (measured,) = served["ranks"]
    layers = [name for name in measured if ".layers." in name]
    assert len(layers) == 30 * 4
    for name in layers:
        parent, _, layer = name.rpartition(".")
        slices = FUSED.get(layer, (layer,))
        assert measured[name] == {
            adapter: [ranks.get(f"{parent}.{part}", 0) for part in slices] for adapter, ranks in expected.items()
        }
    assert {rank for ranks in expected.values() for rank in ranks.values()} == {4, 8, 32}
