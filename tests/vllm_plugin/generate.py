"""Serve the requests of a JSON file by an engine in this process; print the generated tokens and what the model
measured of its slots as JSON, in the last line.

The file: {"engine": arguments of vllm.LLM, "requests": [[prompt, adapter directory or null, tokens], ...]}.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def ranks_of_slots(model):
    """By layer and adapter, the rank of A in every slice; empty with vLLM's own wrapper."""
    manager, ranks = model.lora_manager, {}
    for name, layer in manager.modules.items():
        factors = getattr(layer.punica_wrapper, "factors", None)
        if factors is not None and factors.A:
            measured = factors.ranks_b.T.tolist()
            ranks[name] = {str(i): r for i, r in zip(manager.lora_index_to_id, measured, strict=True) if i}
    return ranks


def main(path):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(path).read_text())
    engine = LLM(**job["engine"])
    adapters = sorted({adapter for _, adapter, _ in job["requests"] if adapter})
    served = {adapter: LoRARequest(Path(adapter).name, i + 1, adapter) for i, adapter in enumerate(adapters)}
    answers = engine.generate(
        [prompt for prompt, _, _ in job["requests"]],
        [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for *_, tokens in job["requests"]],
        lora_request=[served.get(adapter) for _, adapter, _ in job["requests"]],
        use_tqdm=False,
    )
    tokens = [answer.outputs[0].token_ids for answer in answers]
    print(json.dumps({"tokens": tokens, "ranks": engine.apply_model(ranks_of_slots)[0]}))


if __name__ == "__main__":
    main(sys.argv[1])
