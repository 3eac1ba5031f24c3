"""Names of a LoRA's tensors in every community's words: tables and pure functions on strings, no tensors.

One factor, of the first attention's query projection:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight     kohya
    lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight               kohya, LDM's blocks
    diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight         ComfyUI
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight             PEFT
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight          diffusers
    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight     old diffusers, AnimateDiff

and of an attention over time, in MotionLoRAs for sd-webui-animatediff 2,

    down_blocks_0_motion_modules_0_temporal_transformer_transformer_blocks_0_attention_blocks_0_to_q.lora_down.weight

Kohya's first name, without what follows its only dot, stands for the module here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from animatelcm.weights.keys import is_motion, to_animatediff, to_diffusers
from animatelcm.weights.ldm_keys import ldm_unet

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
"""How kohya's names of a part's modules begin; dots become underscores after it."""
Dialect = Literal["kohya", "peft", "old-diffusers"]
ALPHA = ".alpha"
FACTORS = {
    ".lora_down": ".lora_up",
    ".lora_A": ".lora_B",
    ".lora.down": ".lora.up",
    "_lora.down": "_lora.up",
    ".lora_linear_layer.down": ".lora_linear_layer.up",
}
"""The two factors of a layer, before ".weight": kohya, PEFT, diffusers, old diffusers, diffusers' text encoder."""
DIALECTS: dict[str, Dialect] = {
    ".lora_down": "kohya",
    ".lora_A": "peft",
    ".lora.down": "old-diffusers",
    "_lora.down": "old-diffusers",
    ".lora_linear_layer.down": "old-diffusers",
}
"""Whose word a down factor is."""
METHOD_ENDS = {
    ".dora_scale": "DoRA",
    ".on_input": "IA3",
    **dict.fromkeys((f".{name}.weight" for name in ("a1", "a2", "b1", "b2")), "GLoRA"),
    **dict.fromkeys((".diff", ".diff_b"), "full differences of weights"),
}
METHOD_WORDS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid.": "LoCon with a middle matrix (Tucker form)",
    ".lora_magnitude_vector": "DoRA",
    ".oft_": "OFT",
}
"""Changes of weights that are stored like a LoRA and are none: how a key ends or what it holds, and their name."""

PRODUCTS = ("LoHa", "LoKr")
"""Those of them that are read (``lycoris``)."""

_OTHER = FACTORS | {up: down for down, up in FACTORS.items()}
_FACTOR_ENDS = tuple(_OTHER)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|base_model\.model)\.")
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_DOTTED = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
}
_ROOTS = {
    **dict.fromkeys(("conv_in", "conv_out", "time_embedding", "down_blocks", "mid_block", "up_blocks"), "unet"),
    **dict.fromkeys(("text_model", "encoder"), "text_encoder"),
}
"""Part of a name that does not say it, by its first word."""
_RENAMES = (
    (re.compile(r"_processor(?=_)"), ""),
    (re.compile(r"_self_attn_to_([qkv])$"), r"_self_attn_\1_proj"),
    (re.compile(r"_self_attn_to_out$"), "_self_attn_out_proj"),
    (re.compile(r"_to_out$"), "_to_out_0"),
    (re.compile(r"(?<=_motion_modules_)(\d+)_temporal_transformer(?=_)"), r"\1"),
    (re.compile(r"_attention_blocks_0(?=_)"), "_attn1"),
    (re.compile(r"_attention_blocks_1(?=_)"), "_attn2"),
)
"""Old diffusers' words, and AnimateDiff's, with underscores."""

_INVERSION = re.compile(r"^(emb_params|clip_[lg])$|^bundle_emb\.|string_to_param")
_ENDS = tuple(METHOD_ENDS)

_SD15 = {
    *(f"down_blocks.{i}.resnets.{j}" for i in range(4) for j in range(2)),
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    *("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    *(f"up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)),
    *(f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)),
}
"""The blocks of Stable Diffusion 1.5. Another topology has other numbers in LDM."""
_PLACE = re.compile(r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(?:resnets|attentions)\.\d+)\..+")
_PROJECTION = re.compile(r"(.+\.(?:attn[12]|attention_blocks\.[01]))\.(to_[qkv]|to_out)(?:\.0)?")


class Key(NamedTuple):
    """What a tensor of a LoRA file is."""

    stem: str
    """The module in the file's own words."""
    name: str
    """The module in kohya's words; the stem where it is in nobody's."""
    role: Literal["down", "up", "alpha"]
    other: str
    """What follows the stem in the name of the other factor; empty for an alpha."""


def parse(key: str) -> Key | None:
    """What the tensor of this name is, in any dialect; None where it is no part of a plain LoRA."""
    if key.endswith(ALPHA):
        stem = key.removesuffix(ALPHA)
        if factor := _factor(stem):  # the alphas of diffusers' loader have names like "...down.weight.alpha"
            stem = factor[0]
        stem = re.sub(r"[._]lora$", "", stem)
        return Key(stem, _name(stem), "alpha", "")
    found = _factor(key)
    if found is None:
        return None
    stem, factor, adapter = found
    return Key(stem, _name(stem), "down" if factor in FACTORS else "up", f"{_OTHER[factor]}{adapter}.weight")


def foreign(key: str) -> str:
    """Why a tensor of another kind of network is not read, as the rest of a sentence; empty for any other tensor."""
    if (kind := method(key)) and kind not in PRODUCTS:
        advice = "merge it into a checkpoint with the tool that made it, or take a plain LoRA"
    elif _INVERSION.search(key):
        kind, advice = "textual inversion", "give it as --embedding FILE"
    else:
        return ""
    return f"is part of another kind of network ({kind}), which is not read; {advice}"


def method(key: str) -> str:
    """What changes a weight through this tensor, where that is no plain LoRA; empty for any other tensor."""
    if key.endswith(_ENDS):
        return next(name for end, name in METHOD_ENDS.items() if key.endswith(end))
    return next((name for word, name in METHOD_WORDS.items() if word in key), "")


def dialect(key: str) -> Dialect | None:
    """Whose word the down factor of this name is; None for any other tensor."""
    found = _factor(key)
    return DIALECTS.get(found[1]) if found else None


def kohya_name(module: str) -> str:
    """Module path -> kohya's name, the same for both ways to name a text encoder's modules."""
    part, _, path = module.partition(".")
    return _joined(part, path)


def peft_name(module: str) -> str:
    """Module path -> the name in PEFT files of diffusers; a text encoder's has ``text_model.``, which all read."""
    part, _, path = module.partition(".")
    return f"{part}.text_model.{path.removeprefix('text_model.')}" if part == "text_encoder" else module


def animatediff_name(module: str) -> str:
    """Module path -> AnimateDiff's name, which only projections of the UNet's attentions have; empty for others."""
    part, _, path = module.partition(".")
    match = _PROJECTION.fullmatch(to_animatediff(path)) if part == "unet" else None
    return f"{match[1]}.processor.{match[2]}" if match else ""


def names(modules: Iterable[str]) -> dict[str, str]:
    """Kohya's name -> module path, for the parts that have one; LDM's names too if these are the blocks of an SD1.5."""
    known: dict[str, str] = {}
    for module in modules:
        if module.partition(".")[0] in PREFIXES:
            first = known.setdefault(kohya_name(module), module)
            assert first == module, f"kohya has one name for {first} and {module}"
    return _ldm_names(known) | known


def missing(name: str, known: Mapping[str, str]) -> str:
    """Why a module in kohya's words is not among the model's, as the rest of a sentence."""
    if "_motion_modules_" not in name:
        return "is for a module that the model does not have; take a LoRA made for this architecture"
    if not any(is_motion(module) for module in known.values()):
        return "is for a temporal layer, and the model has none; load the model with temporal layers"
    return "is for a temporal layer that the model does not have; take a motion LoRA for temporal layers like its own"


def _factor(key: str) -> tuple[str, str, str] | None:
    """Module, factor, and the name that an adapter has in PEFT with its dot, empty in others; None for no factor."""
    if not key.endswith(".weight"):
        return None
    whole = key.removesuffix(".weight")
    for stem in (whole, whole.rpartition(".")[0]):
        if stem.endswith(_FACTOR_ENDS):
            factor = next(end for end in _OTHER if stem.endswith(end))
            module, adapter = stem.removesuffix(factor), whole.removeprefix(stem)
            return (module, factor, adapter) if module and adapter != "." else None
    return None


def _name(stem: str) -> str:
    for prefix, part in _KOHYA.items():
        if stem.startswith(prefix):
            return _joined(part, stem.removeprefix(prefix))
    path = to_diffusers(_WRAPPERS.sub("", stem))
    for prefix, part in _DOTTED.items():
        if path.startswith(prefix):
            return _joined(part, path.removeprefix(prefix))
    root = path.partition(".")[0]
    if root in _ROOTS or "_motion_modules_" in root:
        return _joined(_ROOTS.get(root, "unet"), path)
    return stem


def _joined(part: str, path: str) -> str:
    flat = path.replace(".", "_")
    if part == "text_encoder":
        flat = flat.removeprefix("text_model_")
    for old, new in _RENAMES:
        flat = old.sub(new, flat)
    return PREFIXES[part] + flat


def _ldm_names(known: Mapping[str, str]) -> dict[str, str]:
    """LDM's name in kohya's words -> module path; {} where the blocks are not Stable Diffusion 1.5's."""
    paths = [module.removeprefix("unet.") for module in known.values() if module.startswith("unet.")]
    if {match[1] for match in map(_PLACE.fullmatch, paths) if match} != _SD15:
        return {}
    ldm = {path: ldm_unet(f"{path}.weight").removesuffix(".weight") for path in paths}
    return {PREFIXES["unet"] + name.replace(".", "_"): f"unet.{path}" for path, name in ldm.items() if name}
