"""LoRA files: kohya's format, which every tool reads and this one writes, and PEFT's, which is read.

A module path is "<part>.<name>", part "unet" or "text_encoder": a parameter's name without its ".weight".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from animatelcm.weights.files import State, read_metadata, read_safetensors, write_safetensors

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
"""How kohya's names of a part's modules begin; dots become underscores after it."""
PARTNERS = {
    ".lora_down.weight": ".lora_up.weight",
    ".lora_up.weight": ".lora_down.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora_B.weight": ".lora_A.weight",
}
"""The two factors of a layer, in kohya's words and in PEFT's."""
ALPHA = ".alpha"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A low-rank change of one weight, (alpha / rank) up @ down (LoRA, section 4.1).

    ``down`` is (r, in) for a linear map and (r, in, k, k) for a convolution, ``up`` (out, r) or (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it was made for: (out, in) or (out, in, k, k)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can take it: a linear map and a 1x1 convolution can take each other's."""
        return _as_map(shape) == _as_map(self.shape)

    def to(self, device: torch.device | str) -> LoraLayer:
        """The same layer with its factors on a device."""
        return LoraLayer(self.down.to(device), self.up.to(device), self.alpha)

    def delta(self, shape: Sequence[int]) -> Tensor:
        """What is added to a weight of this shape, which it must fit: float32."""
        assert self.fits(shape), f"a LoRA for {self.shape} does not fit {tuple(shape)}"
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.alpha / self.rank * product).reshape(tuple(shape))


Lora = dict[str, LoraLayer]
"""Module path -> what is added there."""


def read_lora(path: Path, modules: Iterable[str]) -> Lora:
    """The LoRA of a kohya or PEFT file for a model with these module paths; tensors as stored, on the CPU.

    Without an alpha in the file it is the rank. Raises ValueError with the file and its first key that is for no
    module of the model, no part of a LoRA, incomplete, or not made of finite numbers.
    """
    state, alphas, names = read_safetensors(path), _peft_alphas(path), _by_kohya_name(modules)
    if not any(key.endswith(tuple(PARTNERS)) for key in state):
        raise ValueError(f"{path} is no LoRA file: its first tensor is {min(state, default='missing')!r}")
    lora: Lora = {}
    for key in sorted(state):
        if problem := _problem(key, state, names):
            raise ValueError(f"{path}: {key} {problem}")
        stem, suffix = _split(key)
        if suffix in (".lora_down.weight", ".lora_A.weight"):
            module = names[_kohya_stem(stem)]
            if module in lora:
                raise ValueError(f"{path}: {key} is the second LoRA for {module}; keep one of them")
            default = alphas.get(module.partition(".")[0]) if suffix == ".lora_A.weight" else None
            lora[module] = _layer(state, stem, suffix, default)
    return lora


def write_lora(
    lora: Mapping[str, LoraLayer], path: Path, *, metadata: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> None:
    """Write kohya's format, alphas included and in float32. Raises ValueError where a number does not fit ``dtype``."""
    assert lora, "a LoRA without layers"
    state: State = {}
    for module, layer in lora.items():
        name = _kohya_name(module)
        state[name + ".lora_down.weight"] = layer.down.to(dtype)
        state[name + ".lora_up.weight"] = layer.up.to(dtype)
        state[name + ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
    assert len(state) == 3 * len(lora), "two modules share a name"
    for key in sorted(state):
        if not state[key].isfinite().all():
            raise ValueError(f"{path}: {key} has numbers that are not finite in {state[key].dtype}; nothing is written")
    write_safetensors(state, path, metadata)


def modelspec(*, title: str, kind: str, base: str, rank: int, alpha: float, date: str) -> dict[str, str]:
    """What a LoRA file says about itself, in the keys of ModelSpec 1.0.0 and of kohya's trainer.

    ``kind`` is what it adds ("style", "image_acceleration"), ``base`` the name of the model it was trained on,
    ``date`` is in ISO 8601. "emoji" is an architecture of its own; any other base is a Stable Diffusion 1.5.
    """
    emoji = base == "emoji"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "animatelcm-emoji/lora" if emoji else "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.category": kind,
        "modelspec.date": date,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_sd_model_name": base,
        "ss_base_model_version": "animatelcm_emoji" if emoji else "sd_v1",
    }


def _as_map(shape: Sequence[int]) -> tuple[int, ...]:
    """(out, in, 1, 1) -> (out, in); other shapes as they are."""
    return tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape)


def _kohya_name(module: str) -> str:
    """Module path -> kohya's name, the same for both ways to name a text encoder's modules."""
    part, _, path = module.partition(".")
    return PREFIXES[part] + path.removeprefix("text_model.").replace(".", "_")


def _by_kohya_name(modules: Iterable[str]) -> dict[str, str]:
    """Kohya's name -> module path, for the parts that have one."""
    names: dict[str, str] = {}
    for module in modules:
        if module.partition(".")[0] in PREFIXES:
            known = names.setdefault(_kohya_name(module), module)
            assert known == module, f"kohya has one name for {known} and {module}"
    return names


def _split(key: str) -> tuple[str, str]:
    """A key's module and its role; the role is empty where it is none of a LoRA's."""
    suffix = next((suffix for suffix in (*PARTNERS, ALPHA) if key.endswith(suffix)), "")
    return key.removesuffix(suffix), suffix


def _kohya_stem(stem: str) -> str:
    """The module of a key in kohya's name, whichever format the key is of."""
    path = stem.replace("base_model.model.", "", 1)
    return _kohya_name(path) if path.partition(".")[0] in PREFIXES else stem


def _problem(key: str, state: Mapping[str, Tensor], names: Mapping[str, str]) -> str:
    """What is wrong with a key, as the rest of a sentence; empty if nothing is."""
    stem, suffix = _split(key)
    if not suffix:
        return f"is no part of a plain LoRA, whose keys end in {', '.join(PARTNERS)} or {ALPHA}"
    if _kohya_stem(stem) not in names:
        return "is for a module that the model does not have; take a LoRA made for this architecture"
    value = state[key]
    if suffix != ALPHA and not value.is_floating_point():
        return f"holds {value.dtype} numbers; a LoRA's factors are floating-point"
    if not value.float().isfinite().all():
        return "holds numbers that are not finite; fetch the file again, or take one from before its training failed"
    if suffix == ALPHA:
        return _alpha_problem(stem, value, state)
    if stem + PARTNERS[suffix] not in state:
        return f"has no {PARTNERS[suffix][1:]} beside it; the file is incomplete"
    return _shape_problem(value, state[stem + PARTNERS[suffix]], suffix)


def _alpha_problem(stem: str, value: Tensor, state: Mapping[str, Tensor]) -> str:
    if value.numel() != 1:
        return f"has shape {tuple(value.shape)}; an alpha is one number"
    if not any(stem + suffix in state for suffix in PARTNERS):
        return "has no factors beside it; the file is incomplete"
    return ""


def _shape_problem(value: Tensor, partner: Tensor, suffix: str) -> str:
    down, up = (value, partner) if suffix in (".lora_down.weight", ".lora_A.weight") else (partner, value)
    if down.dim() > 1 and up.dim() > 1 and down.shape[0] == up.shape[1] > 0 and set(up.shape[2:]) <= {1}:
        return ""
    return f"does not fit its partner: down {tuple(down.shape)} is to be (r, in, ...), up {tuple(up.shape)} (out, r)"


def _layer(state: Mapping[str, Tensor], stem: str, down: str, alpha: float | None) -> LoraLayer:
    """The layer whose down factor has this suffix; a key's alpha comes before the given one, the rank after it."""
    factors = state[stem + down], state[stem + PARTNERS[down]]
    if stem + ALPHA in state:
        alpha = state[stem + ALPHA].item()
    return LoraLayer(*factors, alpha=float(factors[0].shape[0] if alpha is None else alpha))


def _peft_alphas(path: Path) -> dict[str, float]:
    """Part -> alpha, from the settings that diffusers stores in the header of a PEFT file."""
    try:
        facts = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its lora_adapter_metadata is damaged ({error}); fetch it again") from error
    for key in sorted(facts):
        if key.endswith((".alpha_pattern", ".use_rslora")) and facts[key]:
            raise ValueError(f"{path}: {key}={facts[key]!r} is not supported; save it with one alpha a part")
    return {key.removesuffix(".lora_alpha"): float(facts[key]) for key in facts if key.endswith(".lora_alpha")}
