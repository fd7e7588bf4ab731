"""vLLM's LoRA layers on lorakern: a plugin of the group `vllm.general_plugins`, active where both are installed.

vLLM runs `register` in each of its processes; nothing of vLLM is imported before.
"""

import functools
import inspect
import os

WRAPPER = "lorakern.integrations.vllm.wrapper.PunicaWrapper"

# "tested": make test-vllm ran with it. "compared": its LoRA layers and manager were read beside those of a tested one.
VERSIONS = {"0.29": "compared", "0.30": "compared", "0.31": "compared", "0.32": "tested", "0.33": "compared"}


def reason_to_stay_out(setting: str, version: str, device_type: str) -> str | None:
    """Why vLLM keeps its own LoRA kernels, or None if lorakern takes over.

    Args:
        setting: the value of ``LORAKERN_VLLM``: "0" is off, "1" also takes over on devices that were not tested yet.
        version: ``vllm.__version__``.
        device_type: what vLLM runs on, "cpu" or "cuda".

    >>> reason_to_stay_out("", "0.32.0", "cpu") is None
    True
    >>> reason_to_stay_out("", "0.28.1", "cpu")
    'vLLM 0.28.1 is not supported (0.29 to 0.33 are)'
    """
    if setting == "0":
        return "LORAKERN_VLLM=0"
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        return f"vLLM {version} is not supported ({min(VERSIONS)} to {max(VERSIONS)} are)"
    if device_type != "cpu" and setting != "1":
        return f"on {device_type} it was not tested yet (LORAKERN_VLLM=1 takes over all the same)"
    return None


def register() -> None:
    """Make vLLM's platform name our wrapper as its LoRA kernels. Runs any number of times."""
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    setting = os.environ.get("LORAKERN_VLLM", "")
    reason = reason_to_stay_out(setting, vllm.__version__, current_platform.device_type)
    if reason is None:
        _take_over(type(current_platform))
    elif setting != "0":
        init_logger("vllm.lorakern").warning("lorakern: vLLM keeps its own LoRA kernels: %s.", reason)


def own_wrapper() -> str:
    """The name of the class that vLLM's platform would use without us."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    return inspect.unwrap(platform.get_punica_wrapper.__func__)(platform)


def _take_over(platform: type) -> None:
    if platform.get_punica_wrapper() == WRAPPER:
        return
    get = platform.get_punica_wrapper.__func__
    platform.get_punica_wrapper = classmethod(functools.wraps(get)(lambda cls: WRAPPER))
    check = platform.check_and_update_config.__func__

    @functools.wraps(check)
    def check_and_update_config(cls, vllm_config):
        config = vllm_config.compilation_config
        wanted = config.mode
        check(cls, vllm_config)
        # The CPU platform compiles a model unless it has LoRA layers, since its own cannot be traced; ours can.
        modes = type(config.mode)
        if cls.device_type == "cpu" and wanted == modes.VLLM_COMPILE and config.mode == modes.NONE:
            config.mode = modes.DYNAMO_TRACE_ONCE

    platform.check_and_update_config = classmethod(check_and_update_config)
