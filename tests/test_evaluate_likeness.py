"""Likeness to a picture: closed forms, published colours, OpenCV's Lab."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from animatelcm.evaluate.likeness import colour_error, identity, psnr, to_lab


def textured(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain(colour: tuple[int, int, int], shape: tuple[int, ...] = (6, 8)) -> np.ndarray:
    return np.full((*shape, 3), colour, np.uint8)


@pytest.mark.parametrize("step", [1, 20, 255])
def test_psnr_of_a_constant_difference(step):
    a, b = plain((0, 0, 0)), plain((step, step, step))
    assert psnr(a, b) == pytest.approx(20 * math.log10(255 / step))
    assert psnr(b, a) == psnr(a, b)


def test_psnr_of_one_pixel_and_of_none():
    a = textured((5, 10, 12, 3))
    b = a.copy()
    b[2, 3, 4, 1] ^= 0x40  # by 64 levels, up or down
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 * a.size / 64**2))
    assert psnr(a, a) == math.inf


def test_psnr_of_noise_follows_its_variance():
    a = np.full((100, 100, 3), 128, np.uint8)
    b = np.rint(np.random.default_rng(0).normal(128, 9, a.shape)).astype(np.uint8)
    assert psnr(a, b) == pytest.approx(20 * math.log10(255 / 9), abs=0.1)


@pytest.mark.parametrize("b", [plain((0, 0, 0))[1:], plain((0, 0, 0)) / 255, plain((0, 0, 0))[None]])
def test_psnr_needs_two_alike(b):
    with pytest.raises(ValueError, match="one shape"):
        psnr(plain((0, 0, 0)), b)


def test_identity_is_the_cosine_of_the_angle():
    angle = torch.linspace(0, math.pi, 7)
    start, side = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(0))).Q.T
    turned = angle.cos()[:, None] * start + angle.sin()[:, None] * side
    lengths = torch.linspace(0.1, 9, 7)[:, None]
    np.testing.assert_allclose(identity(turned * lengths, 4 * start), angle.cos().numpy(), atol=1e-6)


def test_features_of_frames_go_with_those_of_one_picture():
    with pytest.raises(ValueError, match="one picture"):
        identity(torch.ones(4, 8), torch.ones(1, 8))


@pytest.mark.parametrize(
    ("rgb", "lab"),  # brucelindbloom.com, colour calculator: sRGB, D65
    [
        ((255, 255, 255), (100, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 0), (97.14, -21.55, 94.48)),
        ((128, 128, 128), (53.585, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_published_colours(rgb, lab):
    np.testing.assert_allclose(to_lab(np.array(rgb, np.uint8)), lab, atol=0.01)


def test_greys_have_no_colour_and_grow_lighter():
    light, *colour = to_lab(np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)).T
    np.testing.assert_allclose(colour, 0, atol=1e-9)
    assert (np.diff(light) > 0).all()


def test_lab_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    pixels = textured((64, 64, 3))
    theirs = cv2.cvtColor((pixels / 255).astype(np.float32), cv2.COLOR_RGB2LAB)
    np.testing.assert_allclose(to_lab(pixels), theirs, atol=0.5)  # OpenCV interpolates in tables


def test_colours_of_the_same_picture_do_not_differ():
    picture = textured((10, 14, 3))
    shuffled = np.random.default_rng(1).permutation(picture.reshape(-1, 3)).reshape(picture.shape)
    frames = np.stack([picture, shuffled, picture[::-1]])
    np.testing.assert_allclose(colour_error(frames, picture), 0, atol=1e-9)
    np.testing.assert_allclose(colour_error(frames, picture.repeat(3, axis=0).repeat(2, axis=1)), 0, atol=1e-9)


def test_delta_e_of_plain_frames():
    frames = np.stack([plain((0, 0, 0)), plain((255, 255, 255)), plain((255, 0, 0))])
    from_white = [100, 0, math.dist((53.24, 80.09, 67.20), (100, 0, 0))]
    np.testing.assert_allclose(colour_error(frames, plain((255, 255, 255), (3, 5))), from_white, atol=0.01)


def test_what_covers_half_the_frame_counts_half():
    reference, frame = plain((255, 255, 255)), plain((255, 255, 255))
    frame[:, :4] = (30, 90, 200)
    whole = colour_error(plain((30, 90, 200))[None], reference)
    np.testing.assert_allclose(colour_error(frame[None], reference), whole / 2)


def test_what_are_no_pixels_is_refused():
    with pytest.raises(ValueError, match=r"\(F, H, W, 3\)"):
        colour_error(plain((0, 0, 0)), plain((0, 0, 0)))
    with pytest.raises(ValueError, match="uint8"):
        colour_error(plain((0, 0, 0))[None], plain((0, 0, 0)) / 255)
