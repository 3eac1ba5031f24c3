"""What is written is read back: frames, their number, their rate and their words, in every container."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from animatelcm import video
from footage import CONTAINERS, WORDS, noise, psnr, smooth

RATES = (8, 7.5, Fraction(24000, 1001), 23.976, 30)


def meant(fps: float | Fraction) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def test_floats_are_rounded_not_truncated():
    every = np.arange(256)
    assert np.array_equal(video.to_uint8((every / 255).astype(np.float32)), every)
    assert np.array_equal(video.to_uint8(np.array([0.4 / 255, 0.6 / 255, -3.0, 7.0, np.inf])), [0, 1, 0, 255, 255])
    for wrong in (np.array([np.nan]), np.array([1])):
        with pytest.raises(ValueError, match="NaN"):
            video.to_uint8(wrong)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_count_and_rate_survive(tmp_path, container, fps, count):
    path = video.write(smooth(count, 16, 16), tmp_path / f"clip{container}", fps=fps)
    footage, header = video.read(path), video.probe(path)
    assert footage.frames.shape == (count, 16, 16, 3)
    assert footage.frames.dtype == np.uint8
    assert (header.num_frames, header.fps, footage.fps) == (count, meant(fps), meant(fps))


@pytest.mark.parametrize("container", CONTAINERS)
def test_standing_still_loses_no_frames(tmp_path, container):
    """GIF and WebP encoders merge equal frames, and a WebP of one picture keeps no delay."""
    halted = np.concatenate([smooth(1), smooth(1), smooth(9)[4:], smooth(9)[[8] * 3]])
    for name, frames in (("still", smooth(1).repeat(7, 0)), ("halted", halted)):
        footage = video.read(video.write(frames, tmp_path / f"{name}{container}", fps=7.5))
        assert footage.frames.shape == frames.shape
        assert footage.fps == 7.5
        assert psnr(frames, footage.frames) > 30


@pytest.mark.parametrize("colours", [2, 17, 255, 256])
def test_gif_is_exact_up_to_256_colours_a_frame(tmp_path, colours):
    frames = np.stack([noise(colours, 3, seed=i)[noise(33, 21, seed=9 + i).astype(int) % colours] for i in range(5)])
    assert np.array_equal(video.read(video.write(frames, tmp_path / "a.gif", fps=12.5)).frames, frames)


@pytest.mark.parametrize(("container", "quality"), [("", None), (".webp", 100)])
def test_lossless_containers_are_exact(tmp_path, container, quality):
    frames = noise(5, 33, 21, 3)
    path = video.write(frames, tmp_path / f"a{container}", fps=8, quality=quality)
    assert np.array_equal(video.read(path).frames, frames)


@pytest.mark.parametrize(("container", "decibels"), [(".mp4", 44), (".webp", 38)])
def test_lossy_containers_are_close_and_quality_buys_closeness(tmp_path, container, decibels):
    frames = smooth()
    worse, default, better = (
        video.write(frames, tmp_path / f"{quality}{container}", fps=8, quality=quality) for quality in (30, None, 95)
    )
    errors = [psnr(frames, video.read(path).frames) for path in (worse, default, better)]
    bias = frames.mean((0, 1, 2)) - video.read(default).frames.mean((0, 1, 2))
    assert np.abs(bias).max() < 0.5  # levels; swscale's fast paths darken by more than one
    assert errors == sorted(errors)
    assert errors[1] > decibels  # 45.4 and 40.6; chroma half a sample off, or the fast paths: 43.5 and less
    assert worse.stat().st_size < default.stat().st_size < better.stat().st_size


def test_mp4_keeps_plain_colours_to_one_level(tmp_path):
    """Matrix, range and rounding agree between writing and reading; a wrong one shifts by 1 to 20 levels."""
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [0, 0, 0], [255, 255, 255], [40, 200, 90]]
    )
    frames = np.broadcast_to(colours[:, None, None], (7, 32, 32, 3)).astype(np.uint8)
    seen = video.read(video.write(frames, tmp_path / "a.mp4", fps=1, quality=100)).frames.astype(int)
    assert np.abs(seen.mean((1, 2)) - colours).max() <= 1.5


def test_mp4_is_what_browsers_play(tmp_path):
    path = video.write(smooth(), tmp_path / "a.mp4", fps=8)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == (
            "h264",
            "yuv420p",
            1,
            1,
        )
    raw = path.read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("words", [WORDS, {}, {"long": "x" * 100_000}], ids=["odd", "none", "long"])
def test_metadata_survives(tmp_path, container, words):
    path = video.write(smooth(3, 16, 16), tmp_path / f"a{container}", fps=8, metadata=words)
    assert video.read_metadata(path) == words
    assert video.read(path).metadata == words


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_images_come_back_with_their_words(tmp_path, suffix):
    picture = smooth(1)[0]
    path = video.write_image(picture, tmp_path / f"a{suffix}", metadata=WORDS)
    assert video.read_metadata(path) == WORDS
    assert video.probe(path)[:2] == (1, None)
    seen = video.read_image(path)
    assert psnr(picture, seen) > 35 if suffix == ".jpg" else np.array_equal(picture, seen)


def test_every_frame_of_a_sequence_tells_its_recipe(tmp_path):
    path = video.write(smooth(3, 16, 16), tmp_path / "frames", fps=8, metadata=WORDS)
    assert sorted(f.name for f in path.iterdir()) == ["00000.png", "00001.png", "00002.png", "metadata.json"]
    assert video.read_metadata(path / "00002.png") == WORDS


@pytest.mark.parametrize("words", ['{"fps": 0, "num_frames": 2, "metadata": []}', "hello", "[1]", '{"fps": 8}', "1"])
def test_words_of_others_are_not_ours(tmp_path, words):
    frames = [Image.fromarray(frame) for frame in smooth(4, 16, 16)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=40, comment=words.encode())
    assert video.probe(tmp_path / "a.gif") == (4, 25, {})
    assert video.read(tmp_path / "a.gif")[1:] == (25, {})


def test_a_retimed_gif_is_believed_rather_than_its_old_note(tmp_path):
    path = video.write(smooth(6, 16, 16), tmp_path / "a.gif", fps=10)
    raw = path.read_bytes()
    delay = b"!\xf9\x04\x00\x0a\x00"  # graphic control extension: 10 hundredths of a second
    delays = raw.count(delay[:3])
    path.write_bytes(raw.replace(b"\x0a\x00", b"\x14\x00"))
    assert delays == 6
    assert video.read(path).fps == 5


def test_a_contact_sheet_shows_first_to_last(tmp_path):
    plain = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((1, 10, 12, 3), 20, np.uint8)
    sheet = video.contact_sheet([plain, plain[:2]], columns=5, gap=2)
    assert sheet.shape == (2 * 12 + 2, 5 * 14 + 2, 3)
    assert sheet[7, 8::14, 0].tolist() == [0, 40, 80, 120, 160]
    assert sheet[19, 8::14, 0].tolist() == [0, 20, 255, 255, 255]
    labelled = video.contact_sheet([plain, plain], labels=["a parrot", "\u9e1a\u9d61"], columns=5)
    band = labelled.shape[0] - video.contact_sheet([plain, plain], columns=5).shape[0]
    assert band == 2 * 14
    assert (labelled[2:14] < 128).any()
    for rows, labels in (([plain, plain[:, 1:]], None), ([plain], ["a", "b"]), ([], None)):
        with pytest.raises(ValueError, match="contact sheet"):
            video.contact_sheet(rows, labels)


@pytest.mark.parametrize("width", [64, 128, 192])
def test_the_same_frames_are_the_same_bytes(width, tmp_path):
    """Run after run: x264 chooses no B frames where its look-ahead would read what nobody wrote."""
    frames = (smooth(16, 64, width) // 2 + noise(16, 64, width, 3) // 8).astype(np.uint8)
    files = [video.write(frames, tmp_path / f"{i}.mp4", fps=8).read_bytes() for i in range(8)]
    assert len(set(files)) == 1
