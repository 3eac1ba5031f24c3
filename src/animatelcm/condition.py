"""What steers a video beside its text: a picture to animate, layouts to follow, a video to begin from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from animatelcm import control_maps, images, memory
from animatelcm.adapters import IMAGE, lacking
from animatelcm.data.batches import to_pixels
from animatelcm.model import VideoModel
from animatelcm.nets.adapters import NOTHING, Adapter, Clues, Hints
from animatelcm.request import SampleRequest, check_part
from animatelcm.video import probe

if TYPE_CHECKING:
    from PIL.Image import Image

LOG = logging.getLogger(__name__)
Steering = Callable[[Tensor, Tensor, Tensor, float, float, Sequence[range] | None], Hints]
"""(x_t (B, C, F, h, w), t (B,), text (B, L, D), begin and end of the step as shares of all steps, frames) -> hints.

The batch holds windows of frames one after the other, and these once or several times (of a guided one, the half
without text first); None is the whole video."""

KEPT = 64
"""Frames of a video whose maps and features stay on the device for all steps. Those of longer ones are made anew for
each window, so that memory does not grow with them."""


class Control(NamedTuple):
    """A layout: control maps uint8 (F, H, W, 3), and the adapter that reads them, by its name in the model."""

    name: str
    maps: np.ndarray
    scale: float = 1.0
    start: float = 0.0
    """From ``start`` to ``end`` it acts: shares of the steps, of which it takes part in those that lie within."""
    end: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """Pixels that steer a video, all of its size; None or empty where there are none."""

    image: np.ndarray | None = None
    """A picture to animate, uint8 (H, W, 3)."""
    controls: tuple[Control, ...] = ()
    video: np.ndarray | None = None
    """A video to begin from, uint8 (F, H, W, 3)."""


def check_files(request: SampleRequest) -> None:
    """Raises ValueError, before a model is loaded, where a file that a request names is not there or is of no kind that
    is read: headers are looked at, no pixels."""
    if request.image:
        path = images.at_home(request.image)
        with images.explained(path), images.opened(path):
            pass
    for place in filter(None, (request.video, *(control.file for control in request.controls()))):
        if not images.at_home(place).is_dir():
            probe(place)


def read(request: SampleRequest, model: VideoModel) -> Condition:
    """The files that a resolved request names, at its size; what is taken of videos is logged.

    Raises ValueError where a file cannot be read, or the model has no adapter for it.
    """
    for name in sorted(request.adapter_names()):
        _check_adapter(model, name)
    if request.video:
        _check_strength(model, request)
    image = _picture(images.read_image(request.image), request) if request.image else None
    controls = [
        Control(c.name, _frames(request, model, c.file, c.name, ready=c.ready), c.scale, c.start, c.end)
        for c in request.controls()
    ]
    video = _frames(request, model, request.video, "tile", ready=True) if request.video else None
    return Condition(image=image, controls=tuple(controls), video=video)


def with_pixels(
    condition: Condition,
    request: SampleRequest,
    *,
    image: Image | np.ndarray | None = None,
    control: Mapping[str, np.ndarray] | Sequence[Control] = (),
    video: np.ndarray | None = None,
) -> Condition:
    """A condition with pixels of no file added, brought to a resolved request's size as those of files are.

    ``image``: a PIL image or uint8 (H, W, 3); ``video``: uint8 (F, H, W, 3). ``control``: frames uint8 (F, H, W, 3) by
    kind, from which maps are made (depth and pose are maps already), or ``Control``s, whose maps are taken as they are.
    The last frame holds where there are too few. Raises ValueError for pixels of another type or shape.
    """
    if isinstance(control, Mapping):
        elsewhere = control_maps.FOUND_ELSEWHERE
        parts = [Control(n, _maps(n, frames, request, ready=n in elsewhere)) for n, frames in control.items()]
    else:
        parts = [part._replace(maps=_maps(part.name, part.maps, request, ready=True)) for part in control]
    return replace(
        condition,
        image=condition.image if image is None else _picture(image, request),
        controls=(*condition.controls, *parts),
        video=condition.video if video is None else _maps("tile", video, request, ready=True),
    )


def _maps(kind: str, frames: np.ndarray, request: SampleRequest, *, ready: bool) -> np.ndarray:
    count, *size = request.shape
    maps = control_maps.fitted_maps(kind, images.checked_pixels(frames, 4)[:count], *size, request.fit, ready=ready)
    return np.concatenate([maps, *[maps[-1:]] * (count - len(maps))])


def _picture(image: Image | np.ndarray, request: SampleRequest) -> np.ndarray:
    from PIL import ImageOps

    pixels = image if isinstance(image, np.ndarray) else images.rgb(ImageOps.exif_transpose(image))
    return images.fitted(pixels, *request.shape[1:], request.fit)


def _check_adapter(model: VideoModel, name: str) -> None:
    if name not in model.adapters:
        raise lacking(name, model.adapters)


def _check_strength(model: VideoModel, request: SampleRequest) -> None:
    """An lcm sampler spreads all of its steps over that share of its grid which ``strength`` leaves."""
    grid, steps = model.schedule.solver_steps, request.num_inference_steps
    assert steps is not None
    left = int(grid * request.strength)
    if request.sampler == "lcm" and left < steps <= grid:
        enough = math.ceil(1000 * steps / grid) / 1000
        enough += 0.001 * (int(grid * enough) < steps)
        raise ValueError(
            f"strength={request.strength:g} leaves {left} of the {grid} timesteps that this model's lcm sampler knows, "
            f"too few for {steps} steps; take fewer steps, or a strength of {enough:g} at least"
        )


def _frames(request: SampleRequest, model: VideoModel, file: str, kind: str, *, ready: bool) -> np.ndarray:
    size = dict(zip(("num_frames", "height", "width"), request.shape, strict=True))
    options = {"ready": ready, "fps": request.fps or model.facts.fps, "fit": request.fit}
    frames, said = control_maps.read(file, kind, **options, **size)
    LOG.info("%s", said)
    return frames


@torch.inference_mode()
def steering(model: VideoModel, request: SampleRequest, condition: Condition) -> Steering:
    """The condition as hints for any evaluation of the network; what no step changes is computed once.

    Each window of a long video follows its own part of a layout, and animates the picture as the first one does: where
    later ones did not see it, they showed another subject.

    Raises ValueError where the model lacks an adapter, or pixels have another size than the request's.
    """
    _check_sizes(request, condition)
    if condition.video is not None:
        _check_strength(model, request)
    parts: list[tuple[Adapter, Clues | None, Control]] = []
    if condition.image is not None:
        pixels = to_pixels([condition.image[None]]).to(model.device)
        clues = Clues(image=memory.encoded(model, pixels)[:, :, 0], pixels=pixels[:, :, 0])
        parts.append((_adapter(model, IMAGE, request.motion_scale), clues, Control(IMAGE, condition.image)))
    for control in condition.controls:
        check_part(f"control {control.name}", control.scale, control.start, control.end)
        parts.append((_adapter(model, control.name), None, control))
    guided = request.guidance_scale not in (None, 1)
    maps: dict[tuple[int, range], Clues] = {}
    steady: dict[tuple[int, int], Hints] = {}

    def looked_at(i: int, span: range) -> Clues:
        _, picture, control = parts[i]
        if picture is not None:
            return picture
        if (i, span) in maps:
            return maps[i, span]
        cut = torch.from_numpy(control.maps[span.start : span.stop]).to(model.device)
        clues = Clues(maps=cut.permute(3, 0, 1, 2)[None].float() / 255)
        if request.shape[0] <= KEPT:
            maps[i, span] = clues
        return clues

    def unchanging(i: int, span: range, *seen: Tensor) -> Hints:
        adapter, picture, _ = parts[i]
        key = (i, 0 if picture is not None else span.start)
        if key in steady:
            return steady[key]
        with model.exact():
            hints = adapter(*(tensor[:1] for tensor in seen), looked_at(i, span))
        if picture is not None or request.shape[0] <= KEPT:
            steady[key] = hints
        return hints

    def steer(
        x: Tensor, t: Tensor, text: Tensor, begin: float, end: float, spans: Sequence[range] | None = None
    ) -> Hints:
        hints, spans = NOTHING, spans or [range(x.shape[2])]
        repeats = len(x) // len(spans)
        for i, (adapter, _, control) in enumerate(parts):
            if begin < control.start or end > control.end:
                continue
            if adapter.steady:
                found = _batched_hints([unchanging(i, span, x, t, text) for span in spans]).repeated(repeats)
            else:
                clues = _batched_clues([looked_at(i, span) for span in spans])
                told = len(x) // 2 if guided and adapter.pooled else 0
                with model.exact():
                    found = adapter(x[told:], t[told:], text[told:], clues.repeated((len(x) - told) // len(spans)))
                found = found.behind_nothing() if told else found
            hints = hints.merged(found.times(control.scale) if control.scale != 1 else found)
        return hints

    return steer


def _batched_clues(clues: Sequence[Clues]) -> Clues:
    """One after the other in a batch, as ``_batched_hints``."""
    return Clues(*(_joined(each) for each in zip(*clues, strict=True)))


def _batched_hints(hints: Sequence[Hints]) -> Hints:
    features, residuals = ([*map(_joined, zip(*(h[i] for h in hints), strict=True))] for i in range(2))
    return Hints(tuple(features), tuple(residuals), *(_joined([h[i] for h in hints]) for i in (2, 3)))


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return tensors[0] if len(tensors) == 1 or tensors[0] is None else torch.cat(tensors)


def _adapter(model: VideoModel, name: str, motion_scale: float | None = None) -> Adapter:
    _check_adapter(model, name)
    return Adapter(model.adapters[name], motion_scale=motion_scale).eval()


def _check_sizes(request: SampleRequest, condition: Condition) -> None:
    frames, *size = request.shape
    given = {"the picture": condition.image, "the video to begin from": condition.video}
    given |= {f"control {control.name}": control.maps for control in condition.controls}
    for what, pixels in given.items():
        if pixels is None:
            continue
        wanted = (*size, 3) if what == "the picture" else (frames, *size, 3)
        if pixels.shape != wanted or pixels.dtype != np.uint8:
            raise ValueError(f"{what} is {pixels.dtype} {pixels.shape}; give uint8 {wanted}, as the video will be")
