"""Maps are of the frames that were on show at the time, and no more than is needed is read or held."""

from __future__ import annotations

import re
import sys
import tracemalloc
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from animatelcm import control_maps, streams, video
from animatelcm.control_maps import fitted_maps, made, read
from animatelcm.images import fitted
from footage import disc, noise


def take(path: Path, **changes) -> tuple[np.ndarray, str]:
    asked = {"kind": "depth", "ready": True, "num_frames": 4, "fps": 8, "height": 8, "width": 8, **changes}
    return read(path, asked.pop("kind"), **asked)


def numbered(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    """Frame i is a plain grey of level 3 i."""
    return np.broadcast_to(3 * np.arange(count)[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean(axis=(1, 2, 3)) / 3).astype(int).tolist()


@pytest.mark.parametrize("container", ["", ".mp4", ".gif", ".webp"])
@pytest.mark.parametrize(
    ("fps", "asked", "count", "taken", "said"),
    [
        (24, 8, 6, [0, 3, 6, 9, 12, 15], "frames 0 to 15 of 60 (every 3rd, 8 fps)"),
        (8, 8, 4, [0, 1, 2, 3], "frames 0 to 3 of 60 (every frame, 8 fps)"),
        (30, 8, 5, [0, 3, 7, 11, 15], "frames 0 to 15 of 60 (every 3.75th, 8 fps)"),
        (4, 8, 5, [0, 0, 1, 1, 2], "frames 0 to 2 of 60 (each 2 times, 8 fps)"),
        (6, 8, 6, [0, 0, 1, 2, 3, 3], "frames 0 to 3 of 60 (each 1.333 times, 8 fps)"),
        (40, 4, 6, [0, 10, 20, 30, 40, 50], "frames 0 to 50 of 60 (every 10th, 4 fps)"),
        (
            40,
            4,
            9,
            [0, 10, 20, 30, 40, 50, 50, 50, 50],
            "frames 0 to 50 of 60 (every 10th, 4 fps); it is too short: the last one holds for 3 more",
        ),
        (44, 4, 6, [0, 11, 22, 33, 44, 55], "frames 0 to 55 of 60 (every 11th, 4 fps)"),
        (8, Fraction(24000, 1001), 3, [0, 0, 0], "frames 0 to 0 of 60 (each 2.997 times, 23.98 fps)"),
    ],
)
def test_frames_are_those_on_show_at_the_time(tmp_path, container, fps, asked, count, taken, said):
    path = video.write(numbered(60), tmp_path / f"clip{container}", fps=fps, quality=95 if "p" in container else None)
    maps, words = take(path, num_frames=count, fps=asked)
    assert maps.shape == (count, 8, 8, 3)
    assert numbers(maps) == taken == [min(int(i * Fraction(fps) / Fraction(asked)), max(taken)) for i in range(count)]
    assert words == f"clip{container}: {said}"


@pytest.mark.parametrize("num_frames", [59, 60, 61, 200])
def test_the_last_frame_holds(tmp_path, num_frames):
    path = video.write(numbered(60), tmp_path / "clip.mp4", fps=8, quality=95)
    maps, words = take(path, num_frames=num_frames)
    assert numbers(maps) == [min(i, 59) for i in range(num_frames)]
    held = f"; it is too short: the last one holds for {num_frames - 60} more" if num_frames > 60 else ""
    assert words == f"clip.mp4: frames 0 to {min(num_frames, 60) - 1} of 60 (every frame, 8 fps){held}"


def test_a_slow_clip_that_ends_holds_too(tmp_path):
    path = video.write(numbered(3), tmp_path / "clip.gif", fps=4)
    maps, words = take(path, num_frames=9)
    assert numbers(maps) == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert words.endswith("frames 0 to 2 of 3 (each 2 times, 8 fps); it is too short: the last one holds for 3 more")


def uneven(path: Path) -> Path:
    """``numbered`` frames at times, in 24ths of a second, that no constant rate has."""
    ticks = (0, 1, 2, 3, 10, 11, 14, 30, 31, 32, 33, 40)
    if path.suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in numbered(len(ticks)))
        delays = [100 * tick // 24 * 10 for tick in (*ticks, 41)]
        first.save(path, save_all=True, append_images=rest, duration=np.diff(delays).tolist())
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        for tick, level in zip(ticks, numbered(len(ticks)), strict=True):
            frame = av.VideoFrame.from_ndarray(level, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_frames_of_a_variable_rate_are_those_on_show_too(tmp_path, suffix):
    path = uneven(tmp_path / f"a{suffix}")
    maps, words = take(path, num_frames=12)
    assert numbers(maps) == [0, 3, 3, 3, 5, 6, 6, 6, 6, 6, 7, 10]
    assert words == f"a{suffix}: frames 0 to 10 of 12 (by their times, 8 fps)"
    maps, words = take(path, num_frames=20)
    assert numbers(maps) == [0, 3, 3, 3, 5, 6, 6, 6, 6, 6, 7, 10, 10, 10, *[10] * 6]
    held = "it is too short: the last one holds for 6 more"
    assert words == f"a{suffix}: frames 0 to 10 of 12 (by their times, 8 fps); {held}"


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif", "", " from elsewhere.gif", " of images"])
def test_no_more_than_a_frame_is_held_at_its_own_size(tmp_path, suffix):
    frames, path = disc(40, 128, 128), tmp_path / f"a{suffix}"
    if suffix == " from elsewhere.gif":
        first, *rest = (Image.fromarray(frame) for frame in frames)
        first.save(path, save_all=True, append_images=rest, duration=50)
    elif suffix == " of images":
        path.mkdir()
        for i, frame in enumerate(frames):
            video.write_image(frame, path / f"{i}.png")
    else:
        video.write(frames, path, fps=20)
    take(path, num_frames=2)  # what is imported and kept for ever
    tracemalloc.start()
    maps, words = take(path, num_frames=40, fps=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "frames 0 to 39 of 40 (every frame" in words
    assert peak < maps.nbytes * 2 + 10 * frames[0].nbytes  # decoding keeps a few copies of one


def test_a_stream_is_let_go_frame_by_frame(tmp_path, monkeypatch):
    """Its pixels lie where Python's memory is not counted."""
    path, decoded, known = video.write(disc(12), tmp_path / "a.mp4", fps=8), streams._decoded, []

    def spied(frame):
        pixels = decoded(frame)
        known.append(weakref.ref(pixels))
        assert sum(pixels() is not None for pixels in known) <= 2
        return pixels

    monkeypatch.setattr(streams, "_decoded", spied)
    take(path, num_frames=12)
    assert len(known) == 12


def test_a_frame_that_stays_is_mapped_once(tmp_path, monkeypatch):
    path, seen = video.write(disc(5, 16, 16), tmp_path / "clip", fps=4), []
    monkeypatch.setattr(control_maps, "fitted", lambda *asked: seen.append(asked[0]) or fitted(*asked))
    maps, _ = take(path, num_frames=14, height=16, width=16, kind="edge", ready=False)
    assert np.array_equal(np.stack(seen), video.read(path).frames)
    assert np.array_equal(maps, made("edge", np.stack(seen))[[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4]])


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = video.write(numbered(80), tmp_path / "clip.mp4", fps=24)
    decoded, frames_from = [], streams._frames_from

    def counted(*arguments):
        for number, frame in frames_from(*arguments):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(streams, "_frames_from", counted)
    take(path, num_frames=4)
    assert decoded == list(range(10))


def test_a_folder_of_images_is_a_clip(tmp_path, monkeypatch):
    """Any formats and sizes, numbers by value, hidden and other files passed over; no rate of its own."""
    names = ["a_1.png", "a_2.JPG", "a_3.webp", "a_10.bmp", "a_11.tif", "b.png"]
    for level, name in reversed(list(enumerate(names))):
        Image.fromarray(np.full((9 + level, 30 - level, 3), 3 * level, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("a walk")
    (tmp_path / ".a_0.png").write_bytes(b"")
    (tmp_path / "a_0.png").mkdir()
    maps, words = take(tmp_path, num_frames=8, fps=7.5)
    assert numbers(maps) == [0, 1, 2, 3, 4, 5, 5, 5]
    held = "it is too short: the last one holds for 2 more"
    assert words == f"{tmp_path.name}: frames 0 to 5 of 6 (every frame, 7.5 fps); {held}"
    (tmp_path / "b.png").write_bytes(b"damaged, but not needed")
    assert numbers(take(tmp_path, num_frames=3)[0]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"cannot read .*b\.png"):
        take(tmp_path, num_frames=6)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".PNG", ".gif"])
def test_one_image_is_held(tmp_path, suffix):
    Image.fromarray(numbered(50)[49]).save(tmp_path / f"map{suffix}")
    maps, words = take(tmp_path / f"map{suffix}")
    assert maps.shape == (4, 8, 8, 3)
    assert numbers(maps) == [49] * 4
    assert words == f"map{suffix}: one image, held for all 4"


@pytest.mark.parametrize("kind", ["canny", "edge", "tile"])
def test_frames_are_fitted_then_mapped(tmp_path, kind):
    """Not the other way round: edges have the width of the frame's pixels."""
    frames = disc(5, 48, 64)
    path = video.write(frames, tmp_path / "clip", fps=16)
    size = {"height": 24, "width": 24, "num_frames": 3}
    small = np.stack([fitted(frame, 24, 24) for frame in frames[::2]])
    assert np.array_equal(take(path, kind=kind, ready=False, **size)[0], made(kind, small))
    assert np.array_equal(take(path, kind=kind, ready=True, **size)[0], small)


@pytest.mark.parametrize("kind", ["canny", "edge", "tile", "depth"])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("ready", [True, False])
def test_files_are_fitted_as_arrays_are(tmp_path, kind, fit, ready):
    if kind == "depth" and not ready:
        return
    frames = disc(5, 32, 48)
    path, size = video.write(frames, tmp_path / "clip", fps=16), {"height": 24, "width": 20, "fit": fit, "ready": ready}
    expected = fitted_maps(kind, frames[::2], **size)
    assert expected.shape == (3, 24, 20, 3)
    assert np.array_equal(take(path, kind=kind, num_frames=3, **size)[0], expected)
    if fit == "crop":
        size.pop("fit")
        assert np.array_equal(take(path, kind=kind, num_frames=3, **size)[0], expected)
        assert np.array_equal(fitted_maps(kind, frames[::2], **size), expected)
    if fit != "pad" or kind == "tile":
        small = np.stack([fitted(frame, 24, 20, fit) for frame in frames[::2]])
        assert np.array_equal(expected, small if ready or kind == "tile" else made(kind, small))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("clip", {"ready": False}, "a depth control needs ready maps"),
        ("clip", {"kind": "scribble", "ready": False}, "scribble maps cannot be made here"),
        ("clip", {"num_frames": 0}, "num_frames=0"),
        ("clip", {"height": 0}, "8x0"),
        ("clip", {"fit": "squash"}, "fit='squash' to 8x8: choose crop, pad, stretch"),
        ("clip", {"fps": 0}, "fps=0"),
        ("clip", {"fps": 1e-9}, "0.001 are needed"),
        ("clip", {"fps": float("nan")}, "fps=nan"),
        ("none.mp4", {}, "there is no file or folder"),
        ("notes.txt", {}, "cannot read"),
        ("damaged.mp4", {}, "cannot read"),
        ("empty", {}, "holds no images; put in some of .bmp"),
        ("clip/metadata.json", {}, "cannot read"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, change, said):
    video.write(numbered(4), tmp_path / "clip", fps=8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a walk")
    (tmp_path / "damaged.mp4").write_bytes(noise(4000).tobytes())
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        take(tmp_path / name, **change)
    assert "\n" not in str(error.value)


def test_a_rate_that_is_none_is_said(tmp_path):
    path = video.write(numbered(4), tmp_path / "clip", fps=8)
    note = (path / "metadata.json").read_text()
    for rate in ("0", "-8"):
        (path / "metadata.json").write_text(note.replace('"8"', f'"{rate}"'))
        with pytest.raises(ValueError, match=f"has {rate} frames a second"):
            take(path)


def test_maps_of_any_kind_are_read_where_they_are_ready(tmp_path):
    video.write(numbered(4), tmp_path / "clip", fps=8)
    assert np.array_equal(take(tmp_path / "clip", kind="seg")[0], take(tmp_path / "clip", kind="depth")[0])


@pytest.mark.parametrize("kind", ["canny", "edge"])
def test_without_opencv_its_extra_is_named(monkeypatch, tmp_path, kind):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=re.escape(f"a {kind} control needs OpenCV: pip install animatelcm[control]")):
        made(kind, disc())
    video.write_image(disc()[0], tmp_path / "a.png")
    assert take(tmp_path / "a.png", kind="tile")[0].shape == (4, 8, 8, 3)
    assert take(tmp_path / "a.png", kind=kind, ready=True)[0].shape == (4, 8, 8, 3)
