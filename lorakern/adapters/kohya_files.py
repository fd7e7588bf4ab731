"""LoRA files of image models: kohya's names and diffusers' names, with the alphas beside the factors.

kohya:      lora_unet_<module with _ for .>.lora_down.weight (r, d_in), .lora_up.weight (d_out, r), .alpha ()
diffusers:  transformer.<module>.lora_A.weight (r, d_in), .lora_B.weight (d_out, r), alphas in the file's metadata

scale = alpha / r; a module without alpha has alpha = r. Formats: https://github.com/kohya-ss/sd-scripts and
https://github.com/huggingface/diffusers (loaders/lora_base.py).
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakern.adapters.factors import check_name
from lorakern.adapters.json_file import parse_object, show
from lorakern.adapters.peft_config import CONFIG_NAME, AdapterConfig, config_of, make_config
from lorakern.adapters.peft_files import Pair, pair_up, peft_scales
from lorakern.adapters.peft_refusals import PREFIX
from lorakern.adapters.tensor_file import TensorFile
from lorakern.errors import LorakernError

# kohya's prefix of a component: the names that diffusers and ComfyUI give the same component
FLAT = {
    "lora_unet_": ("unet", "transformer", "diffusion_model"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
COMPONENTS = ("diffusion_model", "transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
LETTERS = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_A.weight": "A", "lora_B.weight": "B", "alpha": "alpha"}
METADATA = "lora_adapter_metadata"

_FACTOR = re.compile(
    rf"(?P<module>(?:{'|'.join(FLAT)}|(?:{'|'.join(COMPONENTS)})\.).+)\.(?P<what>{'|'.join(map(re.escape, LETTERS))})",
    re.DOTALL,
)
_REFUSED = (
    (r"dora_scale$|lora_magnitude_vector", "DoRA rescales the merged weight by a learned magnitude"),
    (r"\.hada_|\.w[12]_[ab]$", "LoHa's update is a product of two low-rank matrices, element by element"),
    (r"\.lokr_", "LoKr's update is a Kronecker product"),
    (r"lora_mid\.weight$", "its convolution has a third factor between the two"),
    (r"\.diff(_b)?$", "it replaces a weight or bias by a full difference"),
    (r"\.oft_|\.boft_", "OFT multiplies the base's weight by a rotation"),
    (r"\.(lora_B|lora_up)\.bias$|\.bias$", "it adds a bias"),
    (r"^bundle_emb|string_to_param|emb_params", "it holds embeddings of new tokens"),
    (
        r"\.lora\.(down|up)\.weight$|\.processor\.",
        "it is in the old format of diffusers; save it again from there",
    ),
)


def kohya_layout(
    opened: TensorFile, modules: Collection[str] | None
) -> tuple[dict[str, Pair], dict[str, float], AdapterConfig]:
    """The pairs and scales of the modules, and the PEFT config that says the same."""
    file = opened.file
    keys = [(*_split(key, file), key) for key in opened.tensors]
    alphas = {module: key for module, letter, key in keys if letter == "alpha"}
    pairs = pair_up((key for key in keys if key[1] != "alpha"), opened.tensors, file)
    if alone := alphas.keys() - pairs.keys():
        raise LorakernError(f"{file}: {min(alone)} has an alpha but no factors; the file is incomplete, save it again")
    if METADATA in opened.metadata:
        scales = _metadata_scales(opened, pairs, alphas)
    else:
        scales = {
            module: (_alpha(opened, alphas[module]) if module in alphas else pair.rank) / pair.rank
            for module, pair in pairs.items()
        }
    if modules is not None:
        names = resolve_names(pairs, modules, file)
        pairs = {names[module]: pair for module, pair in pairs.items()}
        scales = {names[module]: scale for module, scale in scales.items()}
    config = make_config(
        {module: (pair.rank, scales[module]) for module, pair in pairs.items()},
        base_model_name_or_path=None,
        fan_in_fan_out=False,
        use_rslora=False,
        task_type=None,
    )
    return pairs, scales, config


def _split(key: str, file: Path) -> tuple[str, str]:
    """(module path as the file has it, "A", "B" or "alpha"); raise `LorakernError` for any other tensor."""
    if match := _FACTOR.fullmatch(key):
        return match["module"], LETTERS[match["what"]]
    if key.startswith(PREFIX):
        raise LorakernError(
            f"{file}: there is no {CONFIG_NAME} beside it, and tensor {show(key)} is PEFT's, which keeps alpha there; "
            "put the config that was saved with the tensors into the same folder"
        )
    why = next((why for pattern, why in _REFUSED if re.search(pattern, key)), None)
    raise LorakernError(
        f"{file}: tensor {show(key)} is not supported: {why}; merge the file into its base model and serve that"
        if why
        else f"{file}: tensor {show(key)} is no LoRA factor. Without a {CONFIG_NAME} beside the file, names are "
        f"<component><module>.lora_down.weight, .lora_up.weight, .lora_A.weight, .lora_B.weight and .alpha, where "
        f"<component> is {', '.join([*FLAT, *(f'{name}.' for name in COMPONENTS)])}; convert the file to PEFT format"
    )


def _alpha(opened: TensorFile, key: str) -> float:
    info = opened.tensors[key]
    if math.prod(info.shape) != 1:
        raise LorakernError(f"{opened.file}: {show(key)} must be one number, got a tensor of shape {info.shape}")
    alpha = float(opened.read(key).double())
    if not math.isfinite(alpha) or alpha == 0:
        raise LorakernError(
            f"{opened.file}: {show(key)} must be a finite number other than 0 (kohya reads 0 as the rank, diffusers as "
            f"no update), got {alpha}; set it to the rank or leave the module out"
        )
    return alpha


def _metadata_scales(opened: TensorFile, pairs: Mapping[str, Pair], alphas: Mapping[str, str]) -> dict[str, float]:
    """The scales that the configs in diffusers' metadata give: {"<component>.<field of a PEFT config>": value}."""
    file = opened.file
    if alphas:
        raise LorakernError(
            f"{file}: it has alphas both in the metadata ({METADATA}) and in {show(min(alphas.values()))}; remove one"
        )
    fields = parse_object(opened.metadata[METADATA].encode("utf-8", "surrogatepass"), file, METADATA)
    components: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        components.setdefault(component, {})[field] = value
    scales = {}
    for component in dict.fromkeys(module.partition(".")[0] for module in pairs):
        if component not in components:
            raise LorakernError(
                f"{file}: {METADATA} has no config of {component}, for which there are tensors; save the file again"
            )
        start = f"{component}."
        ranks = {m.removeprefix(start): pair.rank for m, pair in pairs.items() if m.startswith(start)}
        config = config_of(components[component], file)
        scales |= {start + module: scale for module, scale in peft_scales(ranks, config, file).items()}
    return {module: scales[module] for module in pairs}


def resolve_names(paths: Iterable[str], modules: Collection[str], file: Path) -> dict[str, str]:
    """Path in the file to the one name among `modules` that is written so there."""
    if isinstance(modules, str):
        raise LorakernError(f"modules must be a list of module names, got the string {show(modules)}")
    spelled: dict[str, set[str]] = {}
    for name in filter(None, modules):  # named_modules() begins with the root, ""
        check_name(name, "modules: ")
        for spelling in _spellings(name):
            spelled.setdefault(spelling, set()).add(name)
    names: dict[str, str] = {}
    for path in paths:
        found = sorted(spelled.get(path, ()))
        if len(found) != 1:
            got = f"{len(found)} of the names in modules are: {show(found)}" if found else "no name in modules is"
            raise LorakernError(
                f"{file}: {path} must be one module's name, written with the component first and, after lora_..._, "
                f"with _ for '.', but {got}; give the names of the base model that the file is for"
            )
        names[path] = found[0]
    seen: dict[str, str] = {}
    for path, name in names.items():
        if name in seen:
            raise LorakernError(
                f"{file}: {path} and {seen[name]} are both {name}; name the components in modules, as in "
                "'text_encoder_2.text_model.encoder.layers.0.mlp.fc1'"
            )
        seen[name] = path
    return names


def _spellings(name: str) -> set[str]:
    """What files may call the module `name`, with or without a component in front."""
    spellings = {name} | {f"{component}.{name}" for component in COMPONENTS}
    for prefix, components in FLAT.items():
        locals_ = [name] + [name.removeprefix(f"{c}.") for c in components if name.startswith(f"{c}.")]
        spellings |= {prefix + local.replace(".", "_") for local in locals_}
    return spellings
