"""LoRA files: the changes of weights that they hold, read from every dialect of Stable Diffusion 1.5's users.

A module path is "<part>.<name>", part "unet" or "text_encoder": a parameter's name without its ".weight".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from animatelcm.weights import lora_peft
from animatelcm.weights.files import State, read_state, write_safetensors
from animatelcm.weights.lora_keys import (
    ALPHA,
    FACTORS,
    Key,
    animatediff_name,
    foreign,
    kohya_name,
    missing,
    names,
    parse,
    peft_name,
)
from animatelcm.weights.lycoris import ProductLayer, take_products

Layout = Literal["kohya", "peft", "animatediff"]


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


Layer = LoraLayer | ProductLayer
Lora = dict[str, Layer]
"""Module path -> what is added there."""


def read_lora(path: Path, modules: Iterable[str]) -> Lora:
    """The LoRA of a file for a model with these module paths; tensors as stored, on the CPU.

    Reads kohya's dialect, also with LDM's blocks, PEFT's, diffusers' old and new ones, ComfyUI's, AnimateDiff's of
    motion LoRAs and domain adapters, and LyCORIS' LoHa and LoKr. The alpha is the file's, else that of PEFT's settings,
    else the rank. Raises ValueError with the file and its first key that is of another kind of network, else the first
    that is for no module of the model, no part of a LoRA, incomplete, or not made of finite numbers.
    """
    state, known = read_state(path), names(modules)
    products = take_products(path, state, known)
    if products and path.stem == "adapter_model" and (path.parent / lora_peft.CONFIG).is_file():
        raise ValueError(
            f"{path}: the scale of PEFT's LoHa and LoKr is in its {lora_peft.CONFIG}, which is read for LoRAs alone; "
            "give a file that holds its alphas, as LyCORIS writes it"
        )
    keys = {key: parsed for key in sorted(state) if (parsed := parse(key))}
    if state or not products:
        _check(path, state, keys, known)
    alphas = {parsed.name: state[key].item() for key, parsed in keys.items() if parsed.role == "alpha"}
    settings = lora_peft.read_settings(path)
    lora: Lora = dict(products)
    for key, parsed in keys.items():
        if parsed.role == "down":
            if known[parsed.name] in products:
                raise ValueError(f"{path}: {key} is the second change of {known[parsed.name]}; keep one of them")
            module, down, up = known[parsed.name], state[key], state[parsed.stem + parsed.other]
            alpha = alphas.get(parsed.name)
            if alpha is None and not parsed.stem.startswith("lora_"):
                alpha = settings[module.partition(".")[0]].alpha_of(module, down.shape[0])
            lora[module] = LoraLayer(down, up, alpha=float(down.shape[0] if alpha is None else alpha))
    return lora


def write_lora(
    lora: Mapping[str, Layer],
    path: Path,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
    layout: Layout = "kohya",
) -> None:
    """Write safetensors, rounded once to ``dtype``, with the hashes of its content that ModelSpec and A1111 know.

    "kohya" is what every tool reads; its alphas are tensors in float32. "peft" is diffusers' own dialect, its alphas
    are settings in the header. "animatediff" is for motion LoRAs and domain adapters in other tools: it has no alphas,
    so ``up`` is multiplied by alpha / rank where they differ, and only then it is not the same bit for bit.

    Raises ValueError where a number does not fit ``dtype`` or a module has no name in the layout; nothing is written.
    """
    assert lora, "a LoRA without layers"
    state: State = {}
    for module, layer in sorted(plain(lora, path).items()):
        if not math.isfinite(layer.alpha):
            raise ValueError(f"{path}: the alpha of {module} is {layer.alpha}, which is not finite; nothing is written")
        if layout == "animatediff" and not animatediff_name(module):
            raise ValueError(
                f"{path}: {module} has no name in AnimateDiff's layout, which holds to_q, to_k, to_v and to_out of the "
                "UNet's attentions; write the kohya or the peft layout"
            )
        tensors = _WRITERS[layout](module, layer, dtype)
        assert not tensors.keys() & state.keys(), f"{module} has the name of another module"
        state |= tensors
    for key in sorted(state):
        if not state[key].isfinite().all():
            raise ValueError(f"{path}: {key} has numbers that are not finite in {state[key].dtype}; nothing is written")
    facts = dict(metadata)
    if layout == "peft":
        facts[lora_peft.HEADER] = lora_peft.header(
            {module: (layer.rank, layer.alpha) for module, layer in lora.items()}
        )
    write_safetensors(state, path, facts | _hashes(state))


def plain(lora: Mapping[str, Layer], path: Path) -> dict[str, LoraLayer]:
    """The same LoRA, whose layers are all of low rank. Raises ValueError where one is not, and has no form as such."""
    if other := next((layer for layer in lora.values() if not isinstance(layer, LoraLayer)), None):
        raise ValueError(
            f"{path}: a {other.kind} has no form as a LoRA of low rank; keep its file, or fuse it into a model"
        )
    return dict(lora)


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


def _check(path: Path, state: State, keys: Mapping[str, Key], known: Mapping[str, str]) -> None:
    """Raise for the first key that cannot be read."""
    for key in sorted(state):  # another kind first: its alphas alone would pass for a broken LoRA
        if problem := foreign(key):
            raise ValueError(f"{path}: {key} {problem}")
    layers = {parsed.name for parsed in keys.values() if parsed.role != "alpha"}
    if not layers:
        raise ValueError(f"{path} is no LoRA file: its first tensor is {min(state, default='missing')!r}")
    seen: set[tuple[str, str]] = set()
    for key in sorted(state):
        parsed = keys.get(key)
        if problem := _problem(parsed, state[key], state, known):
            raise ValueError(f"{path}: {key} {problem}")
        assert parsed is not None
        if parsed.name not in layers:
            raise ValueError(f"{path}: {key} has no factors beside it; the file is incomplete")
        if (parsed.name, parsed.role) in seen:
            raise ValueError(f"{path}: {key} is the second LoRA for {known[parsed.name]}; keep one of them")
        seen.add((parsed.name, parsed.role))


def _problem(parsed: Key | None, value: Tensor, state: State, known: Mapping[str, str]) -> str:
    """What is wrong with a tensor, as the rest of a sentence; empty if nothing is."""
    if parsed is None:
        return f"is no part of a plain LoRA, whose keys end like {', '.join(FACTORS)}, their partners or {ALPHA}"
    if parsed.name not in known:
        return missing(parsed.name, known)
    if parsed.role != "alpha" and not value.is_floating_point():
        return f"holds {value.dtype} numbers; a LoRA's factors are floating-point"
    if value.dtype == torch.bool:
        return f"holds {value.dtype}; an alpha is a real number"
    if not value.float().isfinite().all():
        return "holds numbers that are not finite; fetch the file again, or take one from before its training failed"
    if parsed.role == "alpha":
        return "" if value.numel() == 1 else f"has shape {tuple(value.shape)}; an alpha is one number"
    partner = state.get(parsed.stem + parsed.other)
    if partner is None:
        return f"has no {parsed.other.lstrip('._')} beside it; the file is incomplete"
    return _shape_problem(*(value, partner) if parsed.role == "down" else (partner, value))


def _shape_problem(down: Tensor, up: Tensor) -> str:
    if down.dim() > 1 and up.dim() > 1 and down.shape[0] == up.shape[1] > 0 and set(up.shape[2:]) <= {1}:
        return ""
    return f"does not fit its partner: down {tuple(down.shape)} is to be (r, in, ...), up {tuple(up.shape)} (out, r)"


def _kohya(module: str, layer: LoraLayer, dtype: torch.dtype) -> State:
    name = kohya_name(module)
    return {
        f"{name}.lora_down.weight": layer.down.to(dtype),
        f"{name}.lora_up.weight": _up(layer).to(dtype),
        f"{name}{ALPHA}": torch.tensor(layer.alpha, dtype=torch.float32),
    }


def _peft(module: str, layer: LoraLayer, dtype: torch.dtype) -> State:
    name = peft_name(module)
    return {f"{name}.lora_A.weight": layer.down.to(dtype), f"{name}.lora_B.weight": _up(layer).to(dtype)}


def _animatediff(module: str, layer: LoraLayer, dtype: torch.dtype) -> State:
    name = animatediff_name(module)
    up = _up(layer) if layer.alpha == layer.rank else _up(layer).float() * (layer.alpha / layer.rank)
    return {f"{name}_lora.down.weight": layer.down.to(dtype), f"{name}_lora.up.weight": up.to(dtype)}


_WRITERS = {"kohya": _kohya, "peft": _peft, "animatediff": _animatediff}


def _up(layer: LoraLayer) -> Tensor:
    """With as many dimensions as ``down``: (out, r) -> (out, r, 1, 1) for convolutions, as loaders expect."""
    return layer.up.reshape(*layer.up.shape[:2], *[1] * (layer.down.dim() - 2))


def _hashes(state: State) -> dict[str, str]:
    """SHA-256 of all that follows a file's header, by which ModelSpec's readers and A1111 know a file's content."""
    data = memoryview(save({key: value.detach().cpu().contiguous() for key, value in state.items()}))
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
