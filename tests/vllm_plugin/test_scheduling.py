"""Steps that mix what requests are at: chunks of prompts, decode rows, cached prefixes, more adapters than slots."""

import itertools

import pytest
from engines import SKILLS, TAKES_OVER, TOKENS, run, tokens

BUDGET, BLOCK, SLOTS = 48, 32, 2
MORE = ("roman", "pig_latin", "sort_words")


@pytest.fixture(scope="module")
def mixed(requests, prompts, long_prompt):
    """Those of conftest.py and more adapters, each with the step it arrives at: all overlap."""
    coming = [[*request, i // 2] for i, request in enumerate(requests)]
    coming += [[prompts[name][0], str(SKILLS / name), TOKENS, 3 + i] for i, name in enumerate(MORE)]
    return [*coming, [long_prompt, None, TOKENS, 2], [long_prompt, str(SKILLS / "reverse_words"), TOKENS, 2]]


@pytest.fixture(scope="module")
def served(settings, mixed, long_prompt, tmp_path_factory):
    """By name, the rounds of one engine: mixed, each request alone, and twice the same prompt by three."""
    alone = [round for request in mixed for round in ("forget", [request[:3]])]
    same = [
        [long_prompt, adapter, TOKENS] for adapter in (str(SKILLS / "iso_date"), str(SKILLS / "reverse_words"), None)
    ]
    one_by_one = [[request] for request in same]
    engine = settings | {
        "max_loras": SLOTS,
        "max_num_seqs": 8,
        "max_num_batched_tokens": BUDGET,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "block_size": BLOCK,
    }
    rounds = ["forget", mixed, *alone, "forget", *one_by_one, *one_by_one, same]
    answers, log = run(tmp_path_factory.mktemp("served"), rounds, True, **engine)
    assert TAKES_OVER in log
    first, *rest = answers["rounds"]
    n = len(mixed)
    return {
        "adapters": answers["adapters"],
        "mixed": first,
        "alone": rest[:n],
        "first": rest[n : n + 3],
        "again": rest[n + 3 : n + 6],
        "together": rest[n + 6],
    }


def phase(round, row):
    """Of a request in a step: decode, or prefill, in one piece or as a chunk."""
    prompt = round["answers"][row["request"]]["prompt"]
    if row["computed"] >= prompt:
        return "decode"
    return "prefill" if row["tokens"] == prompt else "chunk"


def test_answers_equal_those_of_each_request_alone(served):
    assert tokens(served["mixed"]) == [tokens(round)[0] for round in served["alone"]]


def test_answers_equal_those_of_vllms_own_path(served, own_answers):
    assert tokens(served["mixed"])[: len(own_answers)] == own_answers


def test_steps_mix_prefill_and_decode_of_several_adapters_and_none(served, mixed):
    ids = [served["adapters"][request[1].rpartition("/")[2]] if request[1] else 0 for request in mixed]
    kinds = []
    for step in served["mixed"]["steps"]:
        scheduled, told = {}, {}
        for row in step["rows"]:
            adapter = ids[row["request"]]
            scheduled[adapter] = scheduled.get(adapter, 0) + row["tokens"]
        for adapter, rows in step["mapping"]:
            told[adapter] = told.get(adapter, 0) + rows
        # What the scheduler planned is what the LoRA layers were told.
        assert scheduled == told and sum(told.values()) <= BUDGET
        kinds.append({(phase(served["mixed"], row), ids[row["request"]]) for row in step["rows"]})
    decoding = [{adapter for phase, adapter in kind if phase == "decode"} for kind in kinds]
    computing = [{adapter for phase, adapter in kind if phase != "decode"} for kind in kinds]
    # Rows of an adapter and rows without one decode while the prompt of another adapter is computed.
    assert any(0 in d and d - {0, other} for c, d in zip(computing, decoding, strict=True) for other in c - {0})
    # And a prompt without an adapter beside the decode rows of one.
    assert any(0 in c and d - {0} for c, d in zip(computing, decoding, strict=True))


def test_prompts_were_chunked(served, mixed, long_prompt):
    for number, request in enumerate(mixed):
        rows = [row for step in served["mixed"]["steps"] for row in step["rows"] if row["request"] == number]
        chunks = [row for row in rows if phase(served["mixed"], row) == "chunk"]
        length = served["mixed"]["answers"][number]["prompt"]
        assert sum(row["tokens"] for row in rows) == length + request[2] - 1
        assert (length > BUDGET) == (request[0] == long_prompt)
        assert length <= BUDGET or len(chunks) >= 2


def test_more_adapters_than_slots_in_one_batch(served):
    used = [{adapter for adapter, _ in step["mapping"] if adapter} for step in served["mixed"]["steps"]]
    assert max(map(len, used)) == SLOTS
    assert len(set.union(*used)) == 6
    # Some waited while others had the slots, and the slots changed hands between rows that went on decoding.
    assert any(before & now and now - before and before - now for before, now in itertools.pairwise(used))


def test_prefix_caching_is_of_one_adapter(served):
    first, again = ([round["answers"][0] for round in served[name]] for name in ("first", "again"))
    assert all(answer["prompt"] > 2 * BLOCK for answer in first)
    assert [answer["cached"] for answer in first] == [0, 0, 0]
    assert [answer["cached"] for answer in again] == [2 * BLOCK] * 3
    assert [answer["cached"] for answer in served["together"]["answers"]] == [2 * BLOCK] * 3
    answers = [answer["tokens"] for answer in first]
    assert answers == [answer["tokens"] for answer in again] == tokens(served["together"])
    assert len(set(map(tuple, answers))) == 3
