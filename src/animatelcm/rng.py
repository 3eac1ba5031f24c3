"""Randomness that is addressed, not remembered."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, step: int, rank: int, stream: str, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh generator that depends on its address alone, so a resume has no state to restore.

    `stream` names the consumer ("noise", "timestep", ...): a new consumer shifts nobody else's draws.
    CPU and GPU generators at one address draw different numbers.
    """
    # Hashed, because neighbouring addresses must not share draws and the CPU engine keeps 32 bits of a seed.
    address = f"{seed}/{step}/{rank}/{stream}".encode()
    digest = hashlib.blake2b(address, digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def sent(made: Tensor, device: torch.device) -> Tensor:
    """What the CPU drew or counted, on a device: a copy to CUDA goes by pinned memory, and nobody waits for it."""
    if made.device.type != "cpu" or device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)
