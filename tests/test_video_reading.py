"""Any part of any stream is read as a slice of the whole; damage is named, and raises nothing but ValueError."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from animatelcm import streams, video
from footage import CONTAINERS, WORDS, noise, psnr, smooth


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A clip of 23 frames with a key frame every 5 and B-frames; frame i is a plain grey of level 10 * i."""
    path = tmp_path / "blocks.mp4"
    levels = [np.full((32, 32, 3), 10 * i, np.uint8) for i in range(23)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=12, options={"crf": "5", "g": "5", "bf": "3", "sc_threshold": "0"}
        )
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for level in levels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return path


def levels(frames: np.ndarray) -> list[int]:
    return (frames.reshape(len(frames), -1).mean(1) / 10).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("start", "stride", "count"), [(0, 1, 4), (1, 1, 3), (7, 1, None), (22, 1, 1), (3, 4, 5), (4, 2.5, 7)]
)
def test_a_window_is_a_slice_of_the_whole(blocks, tmp_path, start, stride, count):
    """Also where decoding begins at a key frame in the middle, among B-frames."""
    taken = [int(start + i * stride) for i in range(count or 23 - start)]
    sequence = video.write(video.read(blocks).frames, tmp_path / "frames", fps=12)
    gif = video.write(video.read(blocks).frames, tmp_path / "a.gif", fps=12)
    for path in (blocks, sequence, gif):
        footage = video.read(path, start=start, stride=stride, num_frames=count)
        assert levels(footage.frames) == taken
        assert footage.fps == 12


def test_every_frame_can_be_the_first(blocks):
    assert [levels(video.read(blocks, start=i, num_frames=1).frames) for i in range(23)] == [[i] for i in range(23)]


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "mpeg4"), (".mkv", "libx264"), (".mov", "libx264")])
def test_other_streams_are_read_alike(tmp_path, suffix, codec):
    """Matroska, for one, does not say how many frames it holds."""
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"bf": "2", "g": "4"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 2_000_000
        for i in range(12):
            grey = np.full((32, 32, 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    assert video.probe(path) == (12, 10, {})
    assert levels(video.read(path).frames) == list(range(12))
    assert levels(video.read(path, start=5, num_frames=3, stride=2).frames) == [5, 7, 9]


def test_without_display_times_frames_are_counted(blocks, monkeypatch):
    monkeypatch.setattr(streams, "_shown_packets", lambda *_: iter([SimpleNamespace(pts=None)] * 23))
    assert levels(video.read(blocks, start=7, num_frames=3, stride=2).frames) == [7, 9, 11]


def test_more_frames_than_there_are_is_an_error(blocks):
    for wrong in (
        {"num_frames": 24},
        {"start": 23},
        {"start": 400},
        {"num_frames": 12, "stride": 2, "start": 1},
    ):
        with pytest.raises(ValueError, match="too short"):
            video.read(blocks, **wrong)
    for wrong in ({"num_frames": 0}, {"start": -1}, {"stride": 0.5}):
        with pytest.raises(ValueError, match="at least 0, 1 and 1"):
            video.read(blocks, **wrong)


def test_a_phone_held_upright_is_turned(tmp_path):
    """The matrix of ISO 14496-12 (a b u c d v x y w), here a quarter turn clockwise."""
    frames = smooth(2, 32, 48)
    path = video.write(frames, tmp_path / "a.mp4", fps=8)
    raw = path.read_bytes()
    at = raw.index(b"tkhd") + 44  # version 0: flags, two dates, id, duration, layer and volume come first
    assert raw[at : at + 4] == (1 << 16).to_bytes(4, "big")
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    path.write_bytes(raw[:at] + b"".join(n.to_bytes(4, "big", signed=True) for n in turn) + raw[at + 36 :])
    assert psnr(np.rot90(frames, -1, axes=(1, 2)), video.read(path).frames) > 35


def test_images_are_upright_opaque_and_eight_bits(tmp_path):
    picture, path = noise(6, 9, 3), tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned; show it a quarter turn clockwise
    Image.fromarray(picture).save(path, exif=exif)
    assert np.array_equal(video.read_image(path), np.rot90(picture, -1))
    alpha = noise(6, 9, 1, seed=2)
    Image.fromarray(np.concatenate([picture, alpha], axis=2)).save(path)
    over_white = 255 + (picture.astype(float) - 255) * (alpha / 255)
    assert np.abs(video.read_image(path) - over_white).max() <= 1
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(path)
    assert np.array_equal(video.read_image(path)[..., 1], np.rint(deep / 257))


@pytest.mark.parametrize("container", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.6, 0.9, -1])
def test_a_truncated_file_is_named(tmp_path, container, share):
    path = video.write(smooth(16, 16, 16), tmp_path / f"a{container}", fps=8)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw)) if share >= 0 else share])
    with pytest.raises(ValueError, match=rf"cannot read .*a{container}.*remake it"):
        video.read(path)


def test_a_sequence_without_a_frame_is_named(tmp_path):
    path = video.write(smooth(4, 16, 16), tmp_path / "frames", fps=8)
    (path / "00003.png").unlink()
    with pytest.raises(ValueError, match="4 frames at fps 8, but 3 are here"):
        video.read(path)


@pytest.mark.parametrize("suffix", [*CONTAINERS[:3], ".webm", ".avi", ".png", ".jpg"])
def test_garbage_and_absence_are_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for reader in (video.read, video.probe, video.read_image):
        with pytest.raises(ValueError, match=f"there is no file or folder .*a{suffix}"):
            reader(path)
    path.write_bytes(noise(5000).tobytes())
    for reader in (video.read, video.probe, video.read_image):
        with pytest.raises(ValueError, match=f"cannot read .*a{suffix}"):
            reader(path)


def complaint(path: Path) -> str:
    try:
        video.read(path)
    except ValueError as error:
        return str(error)
    return ""


def test_damage_inside_an_mp4_is_noticed(tmp_path):
    """Also where the decoder conceals it: then only the frame says that it is corrupt."""
    path = video.write(smooth(), tmp_path / "a.mp4", fps=8)
    raw = path.read_bytes()
    assert not complaint(path)
    said = []
    for at in range(raw.index(b"mdat") + 900, len(raw), 200):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        said.append(complaint(path))
    assert all(not words or "cannot read" in words for words in said)
    assert sum("is damaged" in words for words in said) > len(said) / 2


def test_a_truncated_mp4_is_noticed_though_its_beginning_can_be_read(tmp_path):
    path = video.write(smooth(), tmp_path / "a.mp4", fps=8)
    path.write_bytes(path.read_bytes()[:-100])
    for reader in (video.probe, lambda path: video.read(path, num_frames=1)):
        with pytest.raises(ValueError, match="its last 100 bytes are missing"):
            reader(path)


@pytest.mark.parametrize("container", [".gif", ".webp"])
def test_every_beginning_of_a_file_is_read_or_refused(tmp_path, container):
    path = video.write(smooth(2, 8, 8), tmp_path / f"a{container}", fps=8)
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with contextlib.suppress(ValueError):
            assert video.probe(path)[:2] == (2, 8)
        with pytest.raises(ValueError, match="cannot read"):
            video.read(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File", "ignore:Tag data", "ignore:Image size")
def test_damaged_bytes_never_raise_anything_but_value_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # damaged sizes may be huge
    draws = np.random.default_rng(1)
    for container in (".mp4", ".gif", ".webp"):
        path = video.write(smooth(3, 16, 16), tmp_path / f"a{container}", fps=8, metadata=WORDS)
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = raw.copy()
            damaged[draws.integers(48, len(raw), 3)] = noise(3, seed=int(draws.integers(1000)))
            path.write_bytes(damaged.tobytes())
            for reader in (video.read, video.probe):
                with contextlib.suppress(ValueError):
                    reader(path)
