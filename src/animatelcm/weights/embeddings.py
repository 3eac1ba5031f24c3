"""Textual inversions (Gal et al. 2022): what stands in place of a word among the tokens that a text encoder takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from animatelcm.weights.files import State, TensorInfo, check_finite, read_state

OF_NO_NAME = ("*", "emb_params")
"""A1111's files: a pickle's ``string_to_param``, and safetensors. diffusers' have the word itself there."""
OF_XL = {"clip_l", "clip_g"}
BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}
"""Image models by the numbers of a vector."""


def is_embedding(header: Mapping[str, TensorInfo | Tensor]) -> bool:
    """Whether a file with these tensors is a textual inversion: by its names, or one tensor as wide as vectors are."""
    if header.keys() == OF_XL or (len(header) == 1 and header.keys() & set(OF_NO_NAME)):
        return all(len(value.shape) in (1, 2) for value in header.values())
    shapes = [value.shape for key, value in header.items() if key not in ("weight", "bias")]
    return len(header) == len(shapes) == 1 and len(shapes[0]) in (1, 2) and shapes[0][-1] in BASES


def read_embedding(path: Path, width: int, most: int) -> tuple[str, Tensor]:
    """The word that a file names, empty where it names none, and its vectors in float32: (N, ``width``), N <= ``most``.

    Raises ValueError where a file is no textual inversion, or one for other models.
    """
    state = read_state(path)
    if state.keys() != OF_XL and (len(state) != 1 or next(iter(state.values())).ndim not in (1, 2)):
        raise ValueError(f"{path} is no textual inversion; give a file of A1111's or diffusers' that holds one word")
    check_finite(state, path)
    word, vectors = _only(state)
    if vectors.shape[1] != width or state.keys() == OF_XL:
        base = BASES[1280] if state.keys() == OF_XL else BASES.get(vectors.shape[1], "another model")
        raise ValueError(
            f"{path} is a textual inversion for {base} ({vectors.shape[1]} numbers a vector), and this model's text "
            f"encoder takes {width}; take one that was made for it"
        )
    if not 1 <= len(vectors) <= most:
        raise ValueError(f"{path} has {len(vectors)} vectors, and a chunk of a prompt has room for 1 to {most}")
    return ("" if word in OF_NO_NAME else word.strip()), vectors.float()


def _only(state: State) -> tuple[str, Tensor]:
    """The first tensor with its name, as rows."""
    word, value = next(iter(sorted(state.items())))
    return word, value if value.ndim == 2 else value[None]
