"""vLLM's LoRA layers on lorakern: a plugin of the group `vllm.general_plugins`, active where both are installed.

Nothing here imports vLLM before `register` runs, which vLLM does in each of its processes.
"""

import os

# What is known of each release: "tested" = the tests of tests/vllm ran with it.
VERSIONS = {"0.32": "tested"}
WRAPPER = "lorakern.integrations.vllm.wrapper.PunicaWrapper"


def reason_to_stay_out(setting: str, version: str, device_type: str) -> str | None:
    """Why vLLM keeps its own LoRA kernels, or None if lorakern takes over.

    Args:
        setting: the value of ``LORAKERN_VLLM``: "0" is off, "1" also takes over where nothing was tested yet.
        version: ``vllm.__version__``.
        device_type: what vLLM runs on, "cpu" or "cuda".

    >>> reason_to_stay_out("", "0.32.0", "cpu") is None
    True
    >>> reason_to_stay_out("", "0.99.0", "cpu")
    "vLLM 0.99.0 is none of the supported versions (0.32)"
    """
    if setting == "0":
        return "LORAKERN_VLLM=0"
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        return f"vLLM {version} is none of the supported versions ({', '.join(VERSIONS)})"
    if device_type != "cpu" and setting != "1":
        return f"tested on the CPU only, not on {device_type}; LORAKERN_VLLM=1 takes over all the same"
    return None


def register() -> None:
    """Make vLLM's platform name our wrapper as its LoRA kernels. Runs any number of times."""
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger("vllm.lorakern")
    reason = reason_to_stay_out(os.environ.get("LORAKERN_VLLM", ""), vllm.__version__, current_platform.device_type)
    if reason:
        logger.info("lorakern: vLLM keeps its own LoRA kernels: %s.", reason)
        return
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: WRAPPER)
    logger.info("lorakern: serves the LoRA layers of vLLM %s; LORAKERN_VLLM=0 turns it off.", vllm.__version__)
