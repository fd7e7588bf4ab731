"""What a PEFT adapter may hold that is not a plain delta scale * B @ A, and what to do about it.

Taken from peft 0.21.2 (tuners/lora/config.py, layer.py, variants.py). A field or key that is not known here is refused
too: it may change the math.
"""

import re
from pathlib import Path
from typing import Any

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError

PREFIX = "base_model.model."
_MERGE = "merge the adapter into its base model with PEFT's merge_and_unload() and serve the result"
_CONVERT = (
    "save it again from PEFT with path_initial_model_for_weight_conversion, which turns it into a plain LoRA; or, if "
    "base_model_name_or_path is the changed base itself, set init_lora_weights to true in the file"
)

# Fields that make the update something else than scale * B @ A on the original base, whenever they are switched on.
_VARIANTS = {
    "use_dora": f"DoRA rescales the merged weight by a learned magnitude; {_MERGE}",
    "lora_bias": f"it adds a bias to lora_B; {_MERGE}",
    "modules_to_save": f"these modules are trained in full and replace the base's; {_MERGE}",
    "trainable_token_indices": f"rows of the embedding are trained in full; {_MERGE}",
    "layer_replication": "the layers of the base are repeated, so its module names mean other layers; "
    "replicate them in the base model and clear the field",
    "target_parameters": "its factors hold all experts of a parameter in one matrix; target nn.Linear modules instead",
    "alora_invocation_tokens": "aLoRA applies the update only after an invocation sequence; serve it with PEFT",
    "use_qalora": f"QALoRA averages groups of inputs before lora_A; {_MERGE}",
    "use_bdlora": "BD-LoRA stores block-diagonal factors; expand them to full matrices and clear the field",
    "kasa_config": f"KaSA truncates the base weight and adds a diagonal between the factors; {_MERGE}",
    "monteclora_config": f"MonteCLoRA samples perturbations of the factors; {_MERGE}",
    "velora_config": "VeLoRA stores buffers beside the factors; its forward is plain LoRA, so drop the lora_velora "
    "tensors and set the field to null",
    "arrow_config": "Arrow routes between several adapters; load each of them on its own",
    "megatron_config": "Megatron layers shard the factors; save the adapter from an unsharded model",
}
# Off, as PEFT reads it. An empty object is on: PEFT makes a config of defaults from it.
_OFF = (None, False, [], "")

# Known fields that change nothing once the factors are trained; with those that peft_config.py reads, all there are.
_HARMLESS = {
    "auto_mapping",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_READ = {
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "fan_in_fan_out",
    "task_type",
}

# init_lora_weights: these start from B A = 0, or leave the base alone, so the trained factors are a delta on the base.
_PLAIN_INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
# These change the base weight when training starts; the file holds no trace of by how much.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

_KEYS = (
    (r"lora_magnitude_vector", "use_dora: " + _VARIANTS["use_dora"]),
    (r"lora_B\.bias$", "lora_bias: " + _VARIANTS["lora_bias"]),
    (r"base_layer\.bias$", f"the base's biases are trained too (bias is not 'none'); {_MERGE}"),
    (r"\.base_layer\.", "target_parameters: " + _VARIANTS["target_parameters"]),
    (r"lora_embedding_[AB]", f"LoRA on an embedding looks rows up, lorakern's kernels multiply; {_MERGE}"),
    (r"token_adapter", "trainable_token_indices: " + _VARIANTS["trainable_token_indices"]),
    (r"lora_diag", "kasa_config: " + _VARIANTS["kasa_config"]),
    (r"lora_velora", "velora_config: " + _VARIANTS["velora_config"]),
    (r"lora_[AB]\.\w+\.weight$", "it has an adapter name in it; save with PEFT's save_pretrained, which takes it out"),
    (
        r"lora_(down|up)\.weight$|\.alpha$",
        "it is of a kohya file, for which this config says nothing; move the file to a folder "
        "without adapter_config.json to load it as one",
    ),
)
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight", re.DOTALL)


def check_fields(fields: dict[str, Any], file: Path) -> None:
    """Raise `LorakernError` unless the config describes a plain LoRA."""

    def refuse(name: str, why: str) -> LorakernError:
        return LorakernError(f"{file}: {name} = {show(fields.get(name))} is not supported: {why}")

    if fields.get("peft_type") != "LORA":
        raise refuse("peft_type", "lorakern reads adapters of type 'LORA'; convert the adapter, or serve it with PEFT")
    for name, why in _VARIANTS.items():
        if fields.get(name) not in _OFF:
            raise refuse(name, why)
    if fields.get("bias", "none") != "none":
        raise refuse("bias", f"the base's biases are trained too; {_MERGE}")
    init = fields.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        raise refuse("init_lora_weights", f"the base was changed when training began, so this is no delta; {_CONVERT}")
    if init not in _PLAIN_INITS:
        raise refuse("init_lora_weights", "it may have changed the base; if it did not, set it to true in the file")
    for name in sorted(fields.keys() - _VARIANTS.keys() - _HARMLESS - _READ):
        if fields[name] not in (*_OFF, {}):
            raise refuse(name, "lorakern does not know it and it may change the math; if not, set it to null")


def split_key(key: str, file: Path) -> tuple[str, str]:
    """("model.layers.0.q_proj", "A") of a tensor name; raise `LorakernError` for one that is no LoRA factor."""
    match = _FACTOR.fullmatch(key)
    if match and "base_layer" not in match["module"].split("."):
        return match["module"], match["factor"]
    other = (
        "save the adapter again with PEFT's save_pretrained"
        if ".lora_" in key
        else f"modules_to_save: {_VARIANTS['modules_to_save']}"
    )
    hint = next((why for pattern, why in _KEYS if re.search(pattern, key)), other)
    raise LorakernError(
        f"{file}: tensor {show(key)} is no LoRA factor (those are {PREFIX}<module>.lora_A.weight and .lora_B.weight): "
        f"{hint}"
    )
