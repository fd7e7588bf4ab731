"""An engine of vLLM in this process, which answers a JSON line with a JSON line, and sleeps in between.

The first line is {"engine": arguments of vllm.LLM, "adapters": directories}; its answer describes the engine. Then each
line is {"requests": [[prompt, adapter or null, new tokens], ...], "score": token ids to return log-probabilities of}.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch


def describe(engine, seconds: float) -> dict:
    """What was started, as the engine itself has it."""
    config = engine.llm_engine.vllm_config
    return {
        "start_seconds": seconds,
        "mode": config.compilation_config.mode.name,
        "threads": torch.get_num_threads(),
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "wrapper": engine.apply_model(_wrapper)[0],
    }


def _wrapper(model) -> str | None:
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        return None
    return type(next(iter(manager.modules.values())).punica_wrapper).__module__


def _slots(model) -> list | None:
    manager = getattr(model, "lora_manager", None)
    return None if manager is None else list(manager.lora_index_to_id)


def serve(engine, asked: list, adapters: list, score: list[int]) -> dict:
    """Hand over all requests at once and step until they are done.

    Returns:
        "times": for each request the seconds from the hand-over to each of its tokens, as a caller of the engine sees
        them; "tokens"; "scores": of each request the log-probabilities of the tokens `score` as its first new token;
        "slots": the adapters (from 1) in the slots of the engine.
    """
    from vllm import SamplingParams

    core = engine.llm_engine
    times, tokens, scores = ([[] for _ in asked] for _ in range(3))
    options = {"temperature": 0, "ignore_eos": True} | ({"logprob_token_ids": score} if score else {})
    start = time.perf_counter()
    for place, (prompt, adapter, new) in enumerate(asked):
        sampling = SamplingParams(max_tokens=new, **options)
        lora = None if adapter is None else adapters[adapter]
        core.add_request(str(place), {"prompt_token_ids": prompt}, sampling, lora_request=lora)
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter() - start
        for output in outputs:
            place, generated = int(output.request_id), output.outputs[0].token_ids
            times[place] += [now] * (len(generated) - len(times[place]))
            if output.finished:
                tokens[place] = list(generated)
                if score:
                    first = output.outputs[0].logprobs[0]
                    scores[place] = [first[token].logprob for token in score]
    return {"times": times, "tokens": tokens, "scores": scores, "slots": engine.apply_model(_slots)[0]}


def main() -> None:
    # What vLLM prints belongs to the log: answers alone go to the standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    from vllm import LLM
    from vllm.lora.request import LoRARequest

    job = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    engine = LLM(**job["engine"])
    adapters = [LoRARequest(f"adapter{i}", i + 1, path) for i, path in enumerate(job["adapters"])]
    answer(describe(engine, time.perf_counter() - start))
    for line in sys.stdin:
        asked = json.loads(line)
        answer(serve(engine, asked["requests"], adapters, asked["score"]))


if __name__ == "__main__":
    main()
