"""Videos on disk appear whole or not at all, in chunks or at once; what cannot be written is said."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from animatelcm import video
from footage import CONTAINERS, WORDS, noise, smooth


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "a.mov"}, "choose .mp4"),
        ({"path": "a.png"}, "cannot write 2 frames as 'a.png'"),
        ({"path": "a.JPG"}, "cannot write 2 frames as 'a.JPG'"),
        ({"path": "\u00e4" * 99 + ".mp4"}, "has 202 bytes"),
        ({"quality": 80, "path": "a.png", "frames": smooth(1, 16, 16)}, "take none"),
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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".PNG"])
def test_one_frame_is_a_picture_with_words(tmp_path, suffix):
    path = video.write(frames := smooth(1, 15, 17), tmp_path / f"a{suffix}", fps=8, metadata=WORDS)
    assert path.name == f"a{suffix}"
    assert np.abs(video.read_image(path).astype(int) - frames[0]).max() <= (0 if suffix.lower() == ".png" else 24)
    assert video.probe(path) == video.Header(1, None, WORDS)
    with pytest.raises(ValueError, match="exists already"):
        video.check_path(path, num_frames=1)
    with pytest.raises(ValueError, match="cannot write a video as"):
        video.check_path(tmp_path / f"b{suffix}")


def test_home_is_where_a_tilde_points(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert video.write(smooth(2, 16, 16), "~/a.mp4", fps=8) == tmp_path / "a.mp4"
    assert len(video.read("~/a.mp4").frames) == video.probe("~/a.mp4").num_frames == 2
    assert video.write_image(noise(8, 8, 3), "~/a.png") == tmp_path / "a.png"
    assert np.array_equal(video.read_image("~/a.png"), noise(8, 8, 3))


def test_the_longest_name_can_be_written_and_kept_beside(tmp_path):
    path = tmp_path / ("a" * (video.LONGEST_NAME - 4) + ".mp4")
    video.write(smooth(2, 16, 16), path, fps=8)
    (tmp_path / (path.stem + ".latents.safetensors")).write_bytes(b"")
    with pytest.raises(ValueError, match="has 201 bytes"):
        video.check_path(path.with_name("a" + path.name))
