"""An autoencoder in place of a model's own: from its folder, a model's folder, or one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from animatelcm import building
from animatelcm.building import read_json, read_part
from animatelcm.hub import ADAPTER_FILES
from animatelcm.ldm import read_autoencoder
from animatelcm.nets import sd15
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig

FILES = [*ADAPTER_FILES, "vae/*"]
"""What is fetched of a repository: an autoencoder's own, or a whole model's."""
SAME = ("in_channels", "out_channels", "latent_channels", "scaling_factor", "down_block_types")
"""Settings that an autoencoder shares with the one that a UNet's latents come from."""


def read_vae(place: Path, own: Mapping[str, Any], dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of a file (``ldm.read_autoencoder``) or of diffusers' folder, also as a model's ``vae``.

    ``own``: settings of the model's, {} for Stable Diffusion's. Raises ValueError where its latents are others: their
    channels, their size or their scale. (That they mean the same, no file says.)
    """
    if place.is_file():
        config, state = read_autoencoder(place, dtype)
        found = building.autoencoder(config, state, dtype, str(place))
    else:
        folder = place / "vae" if (place / "vae" / "config.json").is_file() else place
        config = read_json(folder / "config.json")
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(
                f"{folder} is a {config['_class_name']}; give an AutoencoderKL's folder or file (an AutoencoderTiny is "
                "for --decoder)"
            )
        found = building.autoencoder(config, read_part(folder, "diffusion_pytorch_model"), dtype, str(folder))
    wanted = AutoencoderConfig.from_diffusers(own or sd15.VAE)
    for name in SAME:
        values = getattr(found.config, name), getattr(wanted, name)
        if values[0] != values[1]:
            raise ValueError(
                f"{place}: an autoencoder with {name}={values[0]!r}, and this model's latents are of one with "
                f"{values[1]!r}; take one that was made for it"
            )
    return found
