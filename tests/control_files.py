"""Stand-ins for ControlNets and T2I-Adapters in one file, as their authors name them: {key: shape}, any width."""

from __future__ import annotations

from standins import SMALL, SMALL_TEXT, Shapes, ldm_unet

CONTROL = "control_model."
MAPS = (16, 32, 96, 256)


def _pair(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def controlnet(channels: tuple[int, ...] = SMALL, text: int = SMALL_TEXT, prefix: str = CONTROL) -> Shapes:
    """A UNet's way down and middle, an encoder of maps (eight convolutions, a SiLU between), and 1x1 convolutions."""
    shapes = {k: v for k, v in ldm_unet(channels, text).items() if not k.startswith(("out.", "output_blocks."))}
    widths = [3, *(width for width in MAPS for _ in range(2))][:-1]
    for i, (before, after) in enumerate(zip(widths, [*widths[1:], channels[0]], strict=True)):
        shapes |= _pair(f"input_hint_block.{2 * i}", after, before, 3, 3)
    skips = [channels[0], *(c for i, c in enumerate(channels) for c in [c, c, c][: 3 - (i == len(channels) - 1)])]
    for i, c in enumerate(skips):
        shapes |= _pair(f"zero_convs.{i}.0", c, c, 1, 1)
    shapes |= _pair("middle_block_out.0", channels[-1], channels[-1], 1, 1)
    return {prefix + key: shape for key, shape in shapes.items()}


def t2i_adapter(channels: tuple[int, ...] = SMALL, seen: int = 3, cell: int = 8) -> Shapes:
    """Two residual blocks a level, in a row; the first of a level that is wider makes it so."""
    shapes = _pair("conv_in", channels[0], seen * cell**2, 3, 3)
    for i in range(2 * len(channels)):
        before, c = channels[max(i - 1, 0) // 2], channels[i // 2]
        shapes |= _pair(f"body.{i}.in_conv", c, before, 1, 1) if before != c else {}
        shapes |= _pair(f"body.{i}.block1", c, c, 3, 3) | _pair(f"body.{i}.block2", c, c, 1, 1)
    return shapes


def light_adapter(channels: tuple[int, ...] = SMALL, seen: int = 3) -> Shapes:
    """Four residual blocks a level at a quarter of its width, between 1x1 convolutions."""
    shapes: Shapes = {}
    for i, c in enumerate(channels):
        before, inner = (seen * 64, *channels)[i], c // 4
        shapes |= _pair(f"body.{i}.in_conv", inner, before, 1, 1) | _pair(f"body.{i}.out_conv", c, inner, 1, 1)
        for j in range(4):
            shapes |= _pair(f"body.{i}.body.{j}.block1", inner, inner, 3, 3)
            shapes |= _pair(f"body.{i}.body.{j}.block2", inner, inner, 3, 3)
    return shapes
