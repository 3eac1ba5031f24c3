"""Pictures keep their middle at every size, and what files may claim is bounded. (Writing: ``test_video.py``.)"""

from __future__ import annotations

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animatelcm import video
from animatelcm.images import explained, fitted, read_image, rgb

FITS = ("crop", "pad", "stretch")
SHAPES = [(1, 1), (1, 5000), (5000, 1), (7, 5), (64, 64), (31, 100), (333, 77)]
SIZES = [(64, 64), (48, 80), (33, 17), (1, 1), (1, 50), (5000, 1)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def symmetric(height: int, width: int) -> np.ndarray:
    """Noise that is its own mirror image, left to right and top to bottom."""
    quarter = noise((height + 1) // 2, (width + 1) // 2, 3)
    half = np.concatenate([quarter, quarter[: height // 2][::-1]])
    return np.concatenate([half, half[:, : width // 2][:, ::-1]], axis=1)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_symmetric_picture_stays_symmetric(shape, fit):
    for size in SIZES:
        seen = fitted(symmetric(*shape), *size, fit).astype(int)
        assert seen.shape == (*size, 3)
        assert np.abs(seen - seen[::-1]).max() <= 1  # floating point: the two halves may round apart
        assert np.abs(seen - seen[:, ::-1]).max() <= 1


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_picture_stays_plain(shape, fit):
    plain = np.broadcast_to(np.array([200, 30, 90], np.uint8), (*shape, 3))
    for size in SIZES:
        assert (fitted(plain, *size, fit) == plain[0, 0]).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flips_commute(shape, fit):
    image = noise(*shape, 3)
    for size in SIZES:
        direct, flipped = fitted(image, *size, fit), fitted(image[:, ::-1], *size, fit)[:, ::-1]
        assert np.abs(direct.astype(int) - flipped).max() <= 1


@pytest.mark.parametrize("fit", FITS)
def test_what_has_the_size_is_not_touched(fit):
    image = noise(33, 17, 3)
    seen = fitted(image, 33, 17, fit)
    assert np.array_equal(seen, image)
    assert not np.shares_memory(seen, image)


def ramp(height: int, width: int) -> np.ndarray:
    """Float levels: red is the distance from the left, green that from the top, from -1 to 1 about the middle."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1, 0 * x], axis=-1)


@pytest.mark.parametrize("shape", [(90, 160), (161, 91), (40, 40), (301, 50)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (120, 33)])
def test_lengths_are_those_of_the_geometry(shape, size):
    """A ramp shows where each pixel was: in the middle of the frame everything is as the closed form has it."""
    image = video.to_uint8(ramp(*shape) / 2 + 0.5)
    longest = {"crop": max, "pad": min}
    for fit in FITS:
        scales = [side / own for side, own in zip(size, shape, strict=True)]
        if fit in longest:
            scales = [longest[fit](scales)] * 2
        away = ramp(*size)[..., :2] * [size[1] / (scales[1] * shape[1]), size[0] / (scales[0] * shape[0])]
        seen = fitted(image, *size, fit)[..., :2] / 127.5 - 1
        inside = (np.abs(away) < 0.8).all(axis=-1)  # of the picture, where neither its border nor the frame's is near
        inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = False
        assert inside.any()
        tolerance = 0.03 if fit != "pad" else 0.03 + 1 / (min(scales) * min(shape))  # its sides are whole pixels
        assert np.abs(seen - away)[inside].max() < tolerance


def test_pads_are_the_mean_of_the_outermost_pixels():
    image = np.full((8, 4, 3), 250, np.uint8)
    image[0], image[-1], image[1:-1, 1:-1] = 10, 30, 0
    seen = fitted(image, 40, 40, "pad")
    assert (seen[:, :10] == round((4 * 10 + 4 * 30 + 2 * 6 * 250) / 20)).all()
    assert np.array_equal(seen[:, :10], seen[:, 30:])
    assert np.array_equal(seen[:, 10:30], fitted(image, 40, 20, "stretch"))
    one = np.arange(5000)[None, :, None].repeat(3, axis=2) % 256
    assert (fitted(one.astype(np.uint8), 9, 9, "pad")[0] == np.rint(one.mean())).all()


@pytest.mark.parametrize("shape", [(20, 100), (51, 100), (57, 60), (99, 100), (2, 300)])
@pytest.mark.parametrize("side", [32, 33, 64, 97])
def test_pads_leave_the_whole_picture_to_a_pixel(shape, side):
    """Black beside white, so that grey borders tell themselves apart."""
    image = np.zeros((*shape, 3), np.uint8)
    image[:, shape[1] // 2 :] = 255
    for seen in (fitted(image, side, side, "pad"), fitted(image.swapaxes(0, 1), side, side, "pad").swapaxes(0, 1)):
        rows = (seen[:, 0, 0] == 0).sum()
        assert abs(rows - max(1, side * shape[0] / shape[1])) <= 1
        assert ((seen[:, -1, 0] == 255) == (seen[:, 0, 0] == 0)).all()


def test_shrinking_does_not_alias():
    """A fine chequerboard becomes grey, a fine grid of lines its mean."""
    board = np.indices((999, 999)).sum(axis=0)[..., None].repeat(3, axis=2) % 2 * 255
    for size in ((64, 64), (100, 37)):
        assert np.abs(fitted(board.astype(np.uint8), *size, "stretch")[2:-2, 2:-2].astype(int) - 127.5).max() < 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fit": "squash"}, "choose crop, pad, stretch"),
        ({"height": 0}, "17x0.*1x1 at least"),
        ({"width": -1}, "1x1 at least"),
        ({"image": noise(3, 3)}, r"\(H, W, 3\) is needed"),
        ({"image": noise(3, 0, 3)}, r"\(H, W, 3\) is needed"),
    ],
)
def test_what_cannot_be_fitted_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        fitted(**{"image": noise(3, 3, 3), "height": 8, "width": 17, **change})


# Reading


def png(path: Path, width: int, height: int, bits: int, colour: int, pixels: bytes, clear: bytes = b"") -> Path:
    """Written by hand; ``colour`` is 0 for grey, 2 for RGB, ``clear`` what tRNS holds."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = {b"IHDR": header, **({b"tRNS": clear} if clear else {}), b"IDAT": pixels, b"IEND": b""}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items()))
    return path


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def rows(levels: np.ndarray) -> bytes:
    """Levels of 16 bits as png stores them, none predicted from another."""
    return zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels))


def png_that_claims(path: Path, width: int, height: int) -> Path:
    """A png of 1 bit a pixel whose pixels are not there."""
    return png(path, width, height, 1, 0, b"")


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_000, 10_000)])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, width, height):
    """Above Pillow's limit, where it would warn, and above twice that, where it would raise."""
    path = png_that_claims(tmp_path / "a.png", width, height)
    said = f"a.png has {width * height:,} pixels, more than the {Image.MAX_IMAGE_PIXELS:,}"
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=said):
            read_image(path)
    assert not leaked
    with pytest.raises(ValueError, match=r"cannot read.*truncated"):
        read_image(png_that_claims(path, 9_000, 9_000))


def test_the_limit_of_pixels_is_one_that_passes(tmp_path, monkeypatch):
    Image.fromarray(noise(10, 20, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert read_image(tmp_path / "a.png").shape == (10, 20, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with pytest.raises(ValueError, match="has 200 pixels, more than the 199"):
        read_image(tmp_path / "a.png")


def test_readers_at_once_leave_warnings_as_they_were(tmp_path):
    paths = [png_that_claims(tmp_path / f"{i}.png", 10_000, 10_000) for i in range(2)]
    with warnings.catch_warnings():
        before = list(warnings.filters)
        first, second = map(explained, paths)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)  # in another order than they began
        with ThreadPoolExecutor(4) as threads:
            tasks = [threads.submit(read_image, path) for path in paths * 100]
        assert all("has 100,000,000 pixels" in str(task.exception()) for task in tasks)
        assert warnings.filters == before


def test_what_is_no_picture_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no file or folder .*none.png$"):
        read_image(tmp_path / "none.png")
    (tmp_path / "a.png").write_text("a parrot")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(ValueError, match=r"^cannot read .*remove or remake it$") as error:
            read_image(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_every_orientation_is_undone(tmp_path, suffix):
    """EXIF tag 274 of the values 1 to 8: how the rows and columns that are stored are to be shown."""
    stored = np.kron(noise(2, 3, 3), np.ones((16, 16, 1), np.uint8))  # blocks as large as those of JPEG
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }
    for orientation, shown in upright.items():
        exif = Image.Exif()
        exif[274] = orientation
        options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True}
        Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif, **options)
        seen = read_image(tmp_path / f"a{suffix}")
        assert seen.shape == shown.shape
        assert np.abs(seen.astype(int) - shown).max() <= (4 if suffix == ".jpg" else 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["index", "levels", "grey", "colour", "grey and alpha"])
def test_whatever_is_transparent_is_white(tmp_path, kind):
    """In each of the ways that png has."""
    path, left = tmp_path / "a.png", np.s_[:, :4]
    grey = np.full((6, 8), 40, np.uint8)
    grey[left] = 200
    colour = np.stack([grey, grey // 2, grey // 4], axis=-1)
    shown = colour if kind in ("index", "levels", "colour") else grey[..., None].repeat(3, axis=2)
    if kind in ("index", "levels"):
        image = Image.fromarray(colour).quantize(2)
        clear = int(np.asarray(image)[0, 0])
        transparent = clear if kind == "index" else bytes(0 if i == clear else 255 for i in range(2))
        image.save(path, transparency=transparent)
    elif kind == "grey":
        Image.fromarray(grey).save(path, transparency=200)
    elif kind == "colour":
        Image.fromarray(colour).save(path, transparency=tuple(colour[0, 0].tolist()))
    else:
        Image.fromarray(np.stack([grey, np.where(grey == 200, 0, 255).astype(np.uint8)], axis=-1)).save(path)
    seen = read_image(path)
    assert (seen[left] == 255).all()
    assert np.array_equal(seen[:, 4:], shown[:, 4:])


def test_one_bit_and_sixteen_are_eight(tmp_path):
    bits = noise(9, 13) > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), bits[..., None].repeat(3, axis=2) * 255)
    deep = np.random.default_rng(0).integers(0, 65536, (9, 13)).astype(np.uint16)
    for suffix in (".png", ".tif"):
        Image.fromarray(deep).save(tmp_path / f"a{suffix}")
        assert np.array_equal(read_image(tmp_path / f"a{suffix}")[..., 2], np.rint(deep / 257))


def test_sixteen_bits_of_one_level_may_be_transparent(tmp_path):
    """One of 65536, not all that round to it: 5000, 4999 and 5001 are all 19."""
    deep = np.array([[5000, 4999, 5001, 0], [65535, 5000, 40000, 20000]])
    shown = np.where(deep == 5000, 255, np.rint(deep / 257))
    path = png(tmp_path / "a.png", 4, 2, 16, 0, rows(deep), struct.pack(">H", 5000))
    assert np.array_equal(read_image(path), shown[..., None].repeat(3, axis=2))
    with Image.open(path) as image:
        assert np.array_equal(rgb(image)[..., 0], shown)
    assert not (read_image(png(path, 4, 2, 16, 0, rows(deep)))[0] == 255).any()


def test_colours_of_sixteen_bits_are_a_level_off_at_most(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (9, 13, 3))
    seen = read_image(png(tmp_path / "a.png", 13, 9, 16, 2, rows(deep.reshape(9, -1))))
    assert np.array_equal(seen, deep // 256)
    assert np.abs(seen - np.rint(deep / 257)).max() <= 1


def test_floats_from_zero_to_one_are_levels(tmp_path):
    """As depth maps have them."""
    depth = np.concatenate([np.arange(256) / 255, np.array([0.4, 0.6, 254.4, 254.6]) / 255]).astype(np.float32)
    shown = np.concatenate([np.arange(256), [0, 1, 254, 255]])
    Image.fromarray(depth.reshape(10, 26)).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), shown.reshape(10, 26, 1).repeat(3, axis=2))
    assert np.array_equal(rgb(Image.fromarray(depth.reshape(10, 26)))[..., 1], shown.reshape(10, 26))


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (np.float32([[0, 7.5], [-3, 1]]), "floats from -3.0 to 7.5, where 0 to 1 is needed"),
        (np.float32([[0, 255]]), "floats from 0.0 to 255.0, where"),
        (np.float32([[-0.5, 1]]), "floats from -0.5 to 1.0, where"),
        (np.float32([[0.5, np.nan, 0.25]]), "floats from 0.25 to 0.5, some NaN, where"),
        (np.float32([[0.5, np.inf]]), "floats from 0.5 to inf, where"),
        (np.int32([[0, 65536]]), "integers from 0 to 65536, where 0 to 65535 is needed"),
        (np.int32([[-1, 5]]), "integers from -1 to 5, where"),
    ],
)
def test_grey_levels_of_no_known_range_are_refused(tmp_path, levels, said):
    Image.fromarray(levels).save(tmp_path / "a.tif")
    words = f"its grey levels are {said}"
    with pytest.raises(ValueError, match=rf"^cannot read .*a\.tif: {words}.*; scale them to that$"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"^{words}.*; scale them to that$"):
        rgb(Image.fromarray(levels))


def test_integers_of_thirty_two_bits_may_hold_sixteen(tmp_path):
    levels = np.array([[0, 128, 129, 65535], [257, 40000, 300, 65406]], np.int32)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], [[0, 0, 1, 255], [1, 156, 1, 254]])


def test_printers_colours_are_shown_as_screens_do(tmp_path):
    """CMYK as JPEG: light is what neither the ink nor the black takes away."""
    ink = np.kron(noise(3, 4, 4), np.ones((16, 16, 1), np.uint8))
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    light = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255
    assert np.abs(read_image(tmp_path / "a.jpg") - light).max() <= 5
