"""Networks from weights: built without numbers, filled with a file's tensors as they are, checked key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.files import State, check_finite, find_copy, read_state

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

LIMITS = {"num_hidden_layers": 128, "hidden_size": 16_384, "intermediate_size": 65_536, "vocab_size": 1_000_000}
"""Of a text encoder's settings, which decide how much is built before any weight is seen."""
_Network = TypeVar("_Network", bound=nn.Module)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the autoencoder's attention layers in folders that diffusers wrote before 0.15."""


def unet(config: UNetConfig, motion: MotionConfig | None, state: State, dtype: torch.dtype, where: str) -> VideoUNet:
    """A VideoUNet with these weights (temporal layers by their names in it). ``state`` is emptied on the way."""
    with empty_weights():
        network = VideoUNet(config, motion)
    return filled(network, state, dtype, where)


def autoencoder(config: Mapping[str, Any], state: State, dtype: torch.dtype, where: str) -> AutoencoderKL:
    """diffusers' autoencoder with these weights, also by the names of older diffusers. ``state`` is emptied."""
    from diffusers import AutoencoderKL

    with empty_weights():
        network = AutoencoderKL.from_config(dict(config))
    renamed = {_new_attention(key): state.pop(key) for key in list(state)}
    return filled(network, renamed, dtype, where)


def _new_attention(key: str) -> str:
    parent, _, leaf = key.rpartition(".")
    stem, _, layer = parent.rpartition(".")
    return f"{stem}.{OLD_ATTENTION[layer]}.{leaf}" if ".attentions." in key and layer in OLD_ATTENTION else key


def text_encoder(config: Mapping[str, Any], state: State, dtype: torch.dtype, where: str) -> CLIPTextModel:
    """transformers' CLIP text model with these weights, with or without its prefix. ``state`` is emptied."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with empty_weights():
        network = CLIPTextModel(CLIPTextConfig(**_settings(config)))
    prefix = "text_model." if any(name.startswith("text_model.") for name, _ in network.named_parameters()) else ""
    renamed = {
        prefix + key.removeprefix("text_model."): state.pop(key)
        for key in list(state)
        if not key.endswith("position_ids") and not key.startswith("text_projection.")
    }
    return filled(network, renamed, dtype, where)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder's config.json without what says how it was stored."""
    stored = {"architectures", "torch_dtype", "dtype", "transformers_version", "model_type", "_name_or_path"}
    for name, most in LIMITS.items():
        value = config.get(name, 1)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"text encoder: {name}={value!r} is out of range; choose 1..{most}")
    return {key: value for key, value in config.items() if key not in stored}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder (tokenizer.json, or vocab.json with merges.txt)."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def clip_tokenizer(merges: Path, length: int) -> CLIPTokenizer:
    """CLIP's tokenizer from its merges alone; the vocabulary follows from them.

    Its order: 256 bytes, 256 bytes that end a word, merges, start and end of text. Texts are cut at ``length`` tokens.
    """
    from transformers import CLIPTokenizer

    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=length)


def _byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2), in its vocabulary's order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    hidden = 256 - len(shown)  # bytes without a visible character stand after all others
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(hidden)]


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
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


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
