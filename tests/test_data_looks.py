"""Control maps of training clips lie where the things in the clips lie."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from animatelcm import control_maps
from animatelcm.data.batches import ClipBatch, pixel_batches, with_first, with_maps
from animatelcm.data.clips import Clip
from animatelcm.data.emoji import EmojiClips, EmojiImages, Scene
from animatelcm.data.looks import DOT, check, control, layout
from animatelcm.data.sprites import CELL, Pose

DISC = torch.zeros(4, CELL, CELL)
DISC[:, 8:56, 8:56] = 1.0


def _centre(channel: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(channel)
    return (columns.mean() + 0.5) * 2 / CELL - 1, (rows.mean() + 0.5) * 2 / CELL - 1


@pytest.mark.parametrize("pose", [Pose(0.6, 0.0, 0.0), Pose(0.5, 0.3, -0.2, 90.0), Pose(0.4, -0.4, 0.4, -30.0)])
def test_keypoints_are_the_centre_and_the_upper_end(pose):
    (drawn,) = layout(Scene(DISC, (pose,), (1.0, 1.0, 1.0)), "pose")
    angle, reach = np.deg2rad(pose.degrees), 0.8 * pose.size
    assert _centre(drawn[..., 0]) == pytest.approx((pose.x, pose.y), abs=0.02)
    assert _centre(drawn[..., 1]) == pytest.approx(
        (pose.x + reach * np.sin(angle), pose.y - reach * np.cos(angle)), abs=0.02
    )
    assert (drawn[..., 0] > 0).sum() == pytest.approx(np.pi * DOT**2, rel=0.2)


def test_depth_is_a_silhouette_that_is_brighter_when_larger():
    poses = (Pose(0.4, 0.0, 0.0), Pose(0.8, 0.0, 0.0))
    small, large = layout(Scene(DISC, poses, (1.0, 0.0, 0.0)), "depth")
    assert small.max() < large.max() < 255
    assert (large > 0).sum() == pytest.approx(4 * (small > 0).sum(), rel=0.2)
    assert (small[..., 0] == small[..., 2]).all()


@pytest.mark.parametrize("data", [EmojiImages(length=4), EmojiClips(length=4)])
def test_a_data_set_gives_maps_of_every_kind(data):
    for kind in ("edge", "canny", "tile", "pose", "depth"):
        check(data, kind)
        maps = control(data, kind, 1)
        assert maps.dtype == np.uint8
        assert maps.shape == data[1].frames.shape
    assert np.array_equal(control(data, "edge", 2), control_maps.made("edge", data[2].frames))


def test_what_frames_do_not_show_needs_a_renderer():
    class Folder:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Clip:
            return EmojiImages(length=1)[0]

    with pytest.raises(ValueError, match="cannot be made from frames"):
        check(Folder(), "depth")
    with pytest.raises(ValueError, match="scribble maps cannot be made"):
        check(EmojiClips(length=1), "scribble")


def test_batches_with_looks_have_what_an_adapter_sees():
    data = EmojiClips(length=3)
    plain = pixel_batches(data)
    batch = with_maps(plain, partial(control, data, "edge"))([2, 0])
    assert torch.equal(batch.pixels, plain([2, 0]).pixels)
    assert batch.maps.shape == (2, 3, 16, 64, 64)
    assert batch.maps.min() >= 0
    assert batch.maps.max() <= 1
    assert np.array_equal((batch.maps[1] * 255).round().byte().permute(1, 2, 3, 0).numpy(), control(data, "edge", 0))
    wanted = plain([1, 2]).pixels[:, :, 0]
    assert torch.equal(with_first(plain, data)([1, 2]).first, wanted)

    def kept(indices: list[int]) -> ClipBatch:
        return replace(plain(indices), pixels=None, latents=torch.zeros(2, 4, 16, 8, 8))

    assert torch.equal(with_first(kept, data)([1, 2]).first, wanted)
