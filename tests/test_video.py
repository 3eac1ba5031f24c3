"""What is written is read back: frames, their number, their rate and their words, in every container."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from animatelcm import streams, video

CONTAINERS = (".mp4", ".gif", ".webp", "")
RATES = (8, 7.5, Fraction(24000, 1001), 23.976, 30)
WORDS = {
    "prompt": 'a "parrot"\nwith \u00e9l\u00e9gance \u2603 \U0001f99c',
    "seed": "7",
    "empty": "",
    "": "\x00\ud800",
}


def smooth(count: int = 16, height: int = 48, width: int = 64) -> np.ndarray:
    """Slowly moving waves of all colours."""
    f, y, x = np.ogrid[:count, :height, :width]
    waves = np.sin(x / 20 + f / 8 + y * 0), np.cos(y / 15 - f / 9 + x * 0), np.sin((x + y) / 30 + f * 0)
    return video.to_uint8(np.stack([0.5 + 0.48 * wave for wave in waves], axis=-1))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def meant(fps: float | Fraction) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


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


@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_is_overwritten_unasked(tmp_path, container):
    path = tmp_path / f"a{container}"
    video.write(smooth(3, 16, 16), path, fps=8)
    with pytest.raises(ValueError, match="exists already"):
        video.write(smooth(5, 16, 16), path, fps=8)
    with pytest.raises(ValueError, match="exists already"):
        video.check_path(path)
    assert len(video.read(path).frames) == 3
    video.write(smooth(5, 16, 16), path, fps=8, overwrite=True)
    assert len(video.read(path).frames) == 5
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def test_an_image_is_not_overwritten_unasked(tmp_path):
    path = video.write_image(smooth(1)[0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="exists already"):
        video.write_image(smooth(1)[0], path)
    video.write_image(noise(8, 8, 3), path, overwrite=True)
    assert np.array_equal(video.read_image(path), noise(8, 8, 3))


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    video.write(smooth(2, 16, 16), tmp_path / "out", fps=8)  # empty: nothing to lose
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        video.write(smooth(2, 16, 16), tmp_path / "out", fps=8, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").is_file()


def break_writing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk fills up after so many frames, with part of a file written."""
    written = iter(range(after))

    def save(self: Image.Image, path: Path, file_format: str, **options: object) -> None:
        if next(written, None) is None:
            path.write_bytes(b"half a file")
            raise OSError("the disk is full")
        return original(self, path, file_format, **options)

    def from_ndarray(*args: object, **options: object) -> av.VideoFrame:
        if next(written, None) is None:
            raise OSError("the disk is full")
        return made(*args, **options)

    original, made = Image.Image.save, av.VideoFrame.from_ndarray
    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=from_ndarray))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_in_the_middle_leaves_things_as_they_were(tmp_path, monkeypatch, container, before):
    path = tmp_path / f"a{container}"
    if before:
        video.write(smooth(3, 16, 16), path, fps=8)
    with monkeypatch.context() as patch:
        break_writing(patch, after=0 if container in (".gif", ".webp") else 2)
        with pytest.raises(OSError, match="disk is full"):
            video.write(smooth(6, 16, 16), path, fps=8, overwrite=True)
    assert [left.name for left in tmp_path.iterdir()] == ([path.name] if before else [])
    assert not before or len(video.read(path).frames) == 3


@pytest.mark.parametrize("container", CONTAINERS)
def test_chunks_make_the_same_file_as_an_array(tmp_path, container):
    frames = smooth(7, 32, 32)
    whole = video.write(frames, tmp_path / f"whole{container}", fps=8, metadata=WORDS)
    parts = iter([frames[:3], frames[3:6], frames[6:]])
    path = video.write(parts, tmp_path / f"parts{container}", fps=8, num_frames=7, metadata=WORDS)
    files = sorted(whole.iterdir()) if whole.is_dir() else [whole]
    again = sorted(path.iterdir()) if path.is_dir() else [path]
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


@pytest.mark.parametrize("container", [".mp4", ""])
def test_a_chunk_is_written_before_the_next_is_asked_for(tmp_path, monkeypatch, container):
    asked, written = 0, []
    from_ndarray, save = av.VideoFrame.from_ndarray, video.save

    def chunks():
        nonlocal asked
        for _ in range(5):
            assert len(written) == 3 * asked
            asked += 1
            yield smooth(3, 16, 16)

    def encoded(*args, **options):
        written.append(1)
        return from_ndarray(*args, **options)

    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=encoded))
    monkeypatch.setattr(video, "save", lambda *args, **options: written.append(1) or save(*args, **options))
    video.write(chunks(), tmp_path / f"a{container}", fps=8, num_frames=15)
    assert len(written) == 15


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("chunks", "count", "named"),
    [
        ([(3, 16, 16)], None, "need num_frames"),
        ([(3, 16, 16)], 4, "num_frames=4, but 3 frames came"),
        ([(3, 16, 16), (3, 16, 16)], 4, "num_frames=4, but 6 or more frames came"),
        ([(3, 16, 16), (1, 16, 32)], 4, r"frames \(16, 32, 3\) come after frames \(16, 16, 3\)"),
        ([], 4, "num_frames=4, but 0 frames came"),
    ],
)
def test_chunks_that_are_no_video_leave_no_file(tmp_path, container, chunks, count, named):
    with pytest.raises(ValueError, match=named):
        video.write((noise(*size, 3) for size in chunks), tmp_path / f"a{container}", fps=8, num_frames=count)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "a.mov"}, "choose .mp4"),
        ({"fps": 0}, "0 < fps"),
        ({"fps": 60, "path": "a.gif"}, "fps <= 50"),
        ({"quality": 101}, "0..100"),
        ({"quality": 80, "path": "a.gif"}, "take none"),
        ({"metadata": {"seed": 7}}, "'seed' does not"),
        ({"frames": np.zeros((2, 16, 16, 3))}, "to_uint8"),
        ({"frames": np.zeros((2, 3, 16, 16), np.uint8)}, "(F, H, W, 3)"),
        ({"frames": np.zeros((0, 16, 16, 3), np.uint8)}, "(F, H, W, 3)"),
        ({"frames": np.zeros((2, 15, 16, 3), np.uint8)}, "even width and height, got 16x15"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, change, said):
    arguments = {"frames": smooth(2, 16, 16), "path": "a.mp4", "fps": 8, **change}
    with pytest.raises(ValueError, match=re.escape(said)):
        video.write(arguments.pop("frames"), tmp_path / arguments.pop("path"), **arguments)
    assert list(tmp_path.iterdir()) == []


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
