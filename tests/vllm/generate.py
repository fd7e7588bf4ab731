"""Serve the requests of a JSON file by an engine in this process; print the generated tokens as JSON, last line.

The file: {"engine": arguments of vllm.LLM, "requests": [[prompt, adapter directory or null, tokens], ...]}.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


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
    print(json.dumps([answer.outputs[0].token_ids for answer in answers]))


if __name__ == "__main__":
    main(sys.argv[1])
