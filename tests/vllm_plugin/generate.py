"""Serve the requests of a JSON file by an engine in this process, and write what came out of it to another.

The file: {"engine": arguments of vllm.LLM, "rounds": [...], "answers": the other file}. Each round is served to its end
before the next begins. It is a list of requests [prompt, adapter directory or null, tokens, steps before it arrives],
where a prompt is a string or a list of token ids and the last may be left out; or the word "forget", which empties the
prefix cache; or "poison", see there.
"""

import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

# Functions go to the workers of tensor parallelism, which is not allowed otherwise.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def ranks_of_slots(model):
    """By layer and adapter, the rank of A in every slice; empty with vLLM's own wrapper."""
    manager, ranks = model.lora_manager, {}
    for name, layer in manager.modules.items():
        factors = getattr(layer.punica_wrapper, "factors", None)
        if factors is not None and factors.A:
            measured = factors.ranks_a.T.tolist()
            ranks[name] = {str(i): r for i, r in zip(manager.lora_index_to_id, measured, strict=True) if i}
    return ranks


def poison(model):
    """Write NaN to what lorakern knows as padding; return how many numbers those were."""
    poisoned = 0
    for layer in model.lora_manager.modules.values():
        known = layer.punica_wrapper.factors
        for factors, all_ranks in ((known.A, known.ranks_a), (known.B, known.ranks_b)):
            for factor, ranks in zip(factors, all_ranks.tolist(), strict=True):
                for slot, rank in zip(factor, ranks, strict=True):
                    # Whole rows of A, and what follows a slot of B that is packed at its rank.
                    width = slot.shape[1] if factors is known.A else slot.shape[0]
                    padding = slot.view(-1)[rank * width :]
                    padding.fill_(torch.nan)
                    poisoned += padding.numel()
    return poisoned


def bytes_of_slots(model):
    held = [getattr(layer, f"lora_{x}_stacked") for layer in model.lora_manager.modules.values() for x in "ab"]
    return sum(f.nbytes for factors in held for f in ([factors] if isinstance(factors, torch.Tensor) else factors))


class Memory(threading.Thread):
    """The highest resident memory of this process since it was last asked, in bytes: of its own pages, and of all.

    All counts the pages of mapped files too, which the system drops and reads again as it pleases.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def status(self, name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    def run(self):
        while True:
            self.peak = max(self.peak, self.status("RssAnon"))
            time.sleep(0.005)

    def take(self):
        peaks = {"own": max(self.peak, self.status("RssAnon")), "all": self.status("VmHWM")}
        self.peak = 0
        Path("/proc/self/clear_refs").write_text("5")
        return peaks


class Recorder:
    """What a step computes, as the scheduler plans it and as the LoRA layers are told."""

    def __init__(self, engine):
        from vllm.lora.model_manager import LoRAModelManager

        self.numbers, self.rows, self.mapping = {}, [], None
        core = engine.llm_engine.engine_core.engine_core
        plan, tell = core.scheduler.schedule, LoRAModelManager.set_adapter_mapping

        def schedule(*args, **kwargs):
            planned = plan(*args, **kwargs)
            computed = {new.req_id: new.num_computed_tokens for new in planned.scheduled_new_reqs}
            cached = planned.scheduled_cached_reqs
            computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            self.rows = [
                {"request": self.numbers[request], "computed": computed[request], "tokens": tokens}
                for request, tokens in planned.num_scheduled_tokens.items()
            ]
            return planned

        def set_adapter_mapping(manager, mapping):
            runs = itertools.groupby(mapping.index_mapping)
            self.mapping = [[int(adapter), len(list(run))] for adapter, run in runs]
            tell(manager, mapping)

        core.scheduler.schedule, LoRAModelManager.set_adapter_mapping = schedule, set_adapter_mapping

    def step(self):
        return {"rows": self.rows, "mapping": self.mapping}


def serve(engine, recorder, requests, adapters):
    """The answer to each request, and what every step computed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    answers, steps = [None] * len(requests), []
    coming = sorted(enumerate(requests), key=lambda item: item[1][3:])
    while coming or engine.llm_engine.has_unfinished_requests():
        while coming and sum(coming[0][1][3:]) <= len(steps):
            number, (prompt, adapter, tokens, *_) = coming.pop(0)
            asked = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                                    output_kind=RequestOutputKind.FINAL_ONLY)  # fmt: skip
            given = engine.llm_engine.add_request(str(number), asked, params, lora_request=adapters.get(adapter))
            recorder.numbers[given] = number
        for answer in engine.llm_engine.step():
            answers[int(answer.request_id)] = {
                "tokens": list(answer.outputs[0].token_ids),
                "prompt": len(answer.prompt_token_ids),
                "cached": answer.num_cached_tokens,
            }
        steps.append(recorder.step())
    return {"answers": answers, "steps": steps}


def main(path):
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    job, memory = json.loads(Path(path).read_text()), Memory()
    engine = LLM(**job["engine"])
    recorder = Recorder(engine)
    requests = [request for round in job["rounds"] if isinstance(round, list) for request in round]
    directories = sorted({adapter for _, adapter, *_ in requests if adapter})
    adapters = {adapter: LoRARequest(Path(adapter).name, i + 1, adapter) for i, adapter in enumerate(directories)}
    answers = {"adapters": {Path(adapter).name: served.lora_int_id for adapter, served in adapters.items()}}
    answers |= {"peak": memory.take(), "rounds": []}
    for round in job["rounds"]:
        if round == "forget":
            assert engine.reset_prefix_cache()
        elif round == "poison":
            answers["poisoned"] = engine.apply_model(poison)
        else:
            served = serve(engine, recorder, round, adapters)
            answers["rounds"].append(served | {"peak": memory.take()})
    if job["engine"].get("enable_lora"):
        answers |= {"ranks": engine.apply_model(ranks_of_slots), "slots": engine.apply_model(bytes_of_slots)}
    Path(job["answers"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
