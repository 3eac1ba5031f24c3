"""Networks from weights: built without numbers, filled with a file's tensors as they are, checked key by key."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.files import State, check_finite, find_copy, read_state

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

TINY_LIMITS = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), 64),
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), 4096),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), 64),
    "upsampling_scaling_factor": 8,
}
"""Of a small autoencoder's settings, which decide how much is built before any weight is seen."""
_Network = TypeVar("_Network", bound=nn.Module)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the autoencoder's attention layers in folders that diffusers wrote before 0.15."""


def unet(config: UNetConfig, motion: MotionConfig | None, state: State, dtype: torch.dtype, where: str) -> VideoUNet:
    """A VideoUNet with these weights (temporal layers by their names in it). ``state`` is emptied on the way."""
    with empty_weights():
        network = VideoUNet(config, motion)
    return filled(network, state, dtype, where)


def autoencoder(config: Mapping[str, Any], state: State, dtype: torch.dtype, where: str) -> Autoencoder:
    """An autoencoder with these weights, also by the names of older diffusers. ``state`` is emptied."""
    with empty_weights():
        network = Autoencoder(AutoencoderConfig.from_diffusers(config))
    renamed = {_new_attention(key): state.pop(key) for key in list(state)}
    return filled(network, renamed, dtype, where)


def tiny_autoencoder(config: Mapping[str, Any], state: State, dtype: torch.dtype, where: str) -> AutoencoderTiny:
    """diffusers' small autoencoder with these weights. ``state`` is emptied. Raises ValueError for another class, and
    for sizes that no such autoencoder has, before anything is built."""
    from diffusers import AutoencoderTiny

    if config.get("_class_name") != "AutoencoderTiny":
        raise ValueError(f"{where} is a {config.get('_class_name')!r}; give an AutoencoderTiny's folder, or a hub id")
    for name, most in TINY_LIMITS.items():
        value = config.get(name, 1)
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > 64 or not all(type(number) is int and 0 < number <= most for number in numbers):
            raise ValueError(f"{where}: {name}={reprlib.repr(value)} is out of range; numbers of 1..{most} are read")
    try:
        with empty_weights():
            network = AutoencoderTiny.from_config(dict(config))
    except (TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{where}: its config.json describes no AutoencoderTiny ({error}); fetch it again") from error
    return filled(network, state, dtype, where)


def _new_attention(key: str) -> str:
    parent, _, leaf = key.rpartition(".")
    stem, _, layer = parent.rpartition(".")
    return f"{stem}.{OLD_ATTENTION[layer]}.{leaf}" if ".attentions." in key and layer in OLD_ATTENTION else key


def text_encoder(config: Mapping[str, Any], state: State, dtype: torch.dtype, where: str) -> TextEncoder:
    """A text encoder with these weights, by CLIP's classic names or those without their prefix, which transformers has
    had since 5.6. ``state`` is emptied."""
    with empty_weights():
        network = TextEncoder(TextConfig.from_transformers(config))
    renamed = {
        "text_model." + key.removeprefix("text_model."): state.pop(key)
        for key in list(state)
        if not key.endswith("position_ids") and not key.startswith("text_projection.")
    }
    return filled(network, renamed, dtype, where)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers network's settings, without its notes about where it came from."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_") or key == "_class_name"}


def filled(network: _Network, state: State, dtype: torch.dtype, where: str) -> _Network:
    """The network with the tensors of ``state`` as its own, converted to ``dtype`` one by one; ``state`` is emptied.

    Nothing is copied that has the type already. Ready for inference: no gradients, evaluation mode. Raises ValueError
    with ``where`` and the first key that is missing, surplus, of another shape, or not made of finite numbers.
    """
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    for key in sorted(wanted.keys() | state.keys()):
        if problem := _problem(key, state, wanted):
            raise ValueError(f"{where}: {key} {problem}")
    converted = {key: _converted(state.pop(key), dtype) for key in list(state)}
    check_finite(converted, Path(where))
    network.load_state_dict(converted, assign=True)
    return network.eval().requires_grad_(False)


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _problem(key: str, state: State, wanted: Mapping[str, torch.Size]) -> str:
    """What is wrong with a key, as the rest of a sentence; empty if nothing is."""
    if key not in state:
        return "is missing; the file is incomplete, or of another architecture"
    if key not in wanted:
        return "is for no layer of this architecture; take weights of the family that the model's config describes"
    if state[key].shape != wanted[key]:
        return f"is {tuple(state[key].shape)}, and the architecture has {tuple(wanted[key])}"
    return ""


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules built meanwhile have parameters without numbers (on the meta device); buffers are computed as usual."""
    register, normal = nn.Module.register_parameter, nn.init.normal_

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    def normal_unless_empty(tensor: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401 - as torch's
        return tensor if tensor.is_meta else normal(tensor, *args, **options)  # torch would load its compiler for it

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    nn.init.normal_ = normal_unless_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.init.normal_ = normal


def read_part(folder: Path, stem: str) -> State:
    """One network's weights in a diffusers folder: ``stem``.safetensors, else its half-precision or pickled copies."""
    file = find_copy(folder, stem)
    if file is None:
        raise ValueError(f"weights are missing: {folder / stem}.safetensors")
    return read_state(file)


def read_json(path: Path) -> dict[str, Any]:
    """A settings file. Raises ValueError naming it where it is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); fetch the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings; fetch the model again")
    return found
