"""A folder becomes a data set by the usual conventions, and says what it left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animatelcm import video
from animatelcm.data.clips import Clip, FolderDataset, fit


def clip(count: int, height: int = 16, width: int = 16, *, base: int = 0) -> np.ndarray:
    """Frame i is a plain grey of level base + 5 i."""
    levels = (base + 5 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def levels(made: Clip) -> list[int]:
    return (made.frames.reshape(len(made.frames), -1).mean(1) / 5).round().astype(int).tolist()


def image(path: Path, level: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    return video.write_image(np.full((*size, 3), level, np.uint8), path)


def listed(folder: Path, rows: list[dict], kind: str = "jsonl") -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def captions(dataset: FolderDataset) -> dict[str, str]:
    return {made.source: made.caption for made in dataset}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_the_hugging_face_convention(tmp_path, kind, column):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.jpg", "sub/c.png", "sub/d.webp"):
        image(tmp_path / name)
    odd = 'a "parrot",\nred\u2028and \u00e9l\u00e9gant \U0001f99c'
    rows = [{"file_name": "b.png", column: odd}, {"file_name": "sub/c.png", column: " two "}]
    listed(tmp_path, [*rows, {"file_name": "./a.jpg", column: "three"}], kind)
    listed(tmp_path / "sub", [{"file_name": "d.webp", column: "four"}], kind)
    dataset = FolderDataset(tmp_path, size=16)
    assert captions(dataset) == {"a.jpg": "three", "b.png": odd, "sub/c.png": "two", "sub/d.webp": "four"}
    assert [made.source for made in dataset] == ["a.jpg", "b.png", "sub/c.png", "sub/d.webp"]
    assert all(made.frames.shape == (1, 16, 16, 3) for made in dataset)
    assert dataset.summary().endswith("0 videos, 4 images, 0 without a caption.")


def test_text_files_beside_and_no_caption_at_all(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        image(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa fox\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("the text file")
    listed(tmp_path, [{"file_name": "b.png", "text": "the table"}, {"file_name": "c.png", "text": None}])
    dataset = FolderDataset(tmp_path, size=8)
    assert captions(dataset) == {"a.png": "a fox", "b.png": "the table", "c.png": "", "d.png": ""}
    assert "2 without a caption" in dataset.summary()


def test_a_named_caption_column(tmp_path):
    image(tmp_path / "a.png")
    listed(tmp_path, [{"file_name": "a.png", "text": "short", "long": "a long story"}])
    assert FolderDataset(tmp_path, size=8, caption_column="long")[0].caption == "a long story"
    with pytest.raises(ValueError, match=r"columns file_name and 'other'; it has file_name, long, text"):
        FolderDataset(tmp_path, caption_column="other")


@pytest.mark.parametrize(
    "name", ["../b.png", "/etc/b.png", "sub/../../b.png", "C:\\b.png", "C:b.png", "..\\b.png", "\\b.png"]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_names_that_leave_the_folder_are_an_error(tmp_path, name, kind):
    image(tmp_path / "in" / "a.png")
    image(tmp_path / "b.png")
    listed(tmp_path / "in", [{"file_name": name, "text": "escape"}], kind)
    with pytest.raises(ValueError, match="outside the folder"):
        FolderDataset(tmp_path / "in")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{oops\n', "line 2 of .* is not JSON"),
        ('["a.png"]\n', "line 1 of .* must be an object"),
        ('{"file_name": "a.png", "text": ["x", "y"]}\n', "row 1 of .* one caption"),
        ('{"text": "x"}\n', "needs the columns file_name and text or caption; it has text"),
        ('{"file_name": "a.png", "label": "x"}\n', "it has file_name, label"),
        ('{"file_name": "a.png", "text": "x"}\n' * 2, "a second time"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, said):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        FolderDataset(tmp_path)


def test_every_container_is_a_video_and_a_still_webp_an_image(tmp_path):
    for suffix in (".mp4", ".gif", ".webp"):
        video.write(clip(6), tmp_path / f"a{suffix}", fps=8)
    dataset = FolderDataset(tmp_path, num_frames=5, size=16)
    assert [made.source for made in dataset] == ["a.gif", "a.mp4", "a.webp"]
    assert all(levels(made) == [0, 1, 2, 3, 4] for made in dataset)
    image(tmp_path / "still.webp")
    assert [len(made.frames) for made in FolderDataset(tmp_path, num_frames=1, size=16)] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"images cannot share batches.*3 videos, 1 images"):
        FolderDataset(tmp_path, num_frames=5)


def test_stride_and_rate(tmp_path):
    video.write(clip(31), tmp_path / "a.webp", fps=30, quality=100)
    assert levels(FolderDataset(tmp_path, num_frames=4, frame_stride=10, size=16)[0]) == [0, 10, 20, 30]
    assert levels(FolderDataset(tmp_path, num_frames=5, fps=8, size=16)[0]) == [
        0,
        3,
        7,
        11,
        15,
    ]  # 30 / 8 = 3.75
    assert levels(FolderDataset(tmp_path, num_frames=2, fps=30, size=16)[0]) == [0, 1]


def test_random_windows_are_addressed(tmp_path):
    video.write(clip(20), tmp_path / "a.webp", fps=8, quality=100)
    video.write(clip(4), tmp_path / "b.webp", fps=8, quality=100)
    options = {"num_frames": 4, "size": 16, "repeats": 60}
    dataset = FolderDataset(tmp_path, seed=3, **options)
    seen = [levels(made) for made in dataset]
    assert len(seen) == len(dataset) == 120
    assert {starts[0] for starts in seen[0::2]} == set(range(17))  # every window is drawn, none outside
    assert {starts[0] for starts in seen[1::2]} == {0}
    assert all(starts == list(range(starts[0], starts[0] + 4)) for starts in seen)
    again = FolderDataset(tmp_path, seed=3, **options)
    assert [levels(again[i]) for i in (77, 2, 60)] == [seen[i] for i in (77, 2, 60)]
    assert [levels(made) for made in FolderDataset(tmp_path, seed=4, **options)] != seen


def test_what_cannot_be_used_is_skipped_and_named(tmp_path):
    good = video.write(clip(8), tmp_path / "good.mp4", fps=8)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "noise.gif").write_bytes(b"no gif at all")
    video.write(clip(3), tmp_path / "short.webp", fps=8)
    video.write(clip(8), tmp_path / "slow.mp4", fps=2)
    listed(tmp_path, [{"file_name": "gone.mp4", "text": "lost"}, {"file_name": "good.mp4", "text": "kept"}])
    dataset = FolderDataset(tmp_path, num_frames=4, fps=8, size=16)
    assert dataset.skipped == ["cut.mp4", "gone.mp4", "noise.gif", "short.webp", "slow.mp4"]
    assert captions(dataset) == {"good.mp4": "kept"}
    said = dataset.summary()
    assert "5 skipped" in said
    for reason in (
        "its last 20 bytes are missing",
        "no file or folder",
        "3 frames, 4 are needed",
        "2 frames a second",
    ):
        assert reason in said


def test_damage_found_while_decoding_is_replaced_and_named(tmp_path):
    paths = [image(tmp_path / f"{name}.png", level) for name, level in (("a", 5), ("b", 10), ("c", 15))]
    raw = bytearray(paths[1].read_bytes())
    raw[raw.index(b"IDAT") + 6] ^= 0xFF
    paths[1].write_bytes(raw)
    dataset = FolderDataset(tmp_path, size=16)
    assert dataset.skipped == []
    assert [levels(made) for made in dataset] == [[1], [3], [3]]
    assert [made.source for made in dataset] == ["a.png", "c.png", "c.png"]
    assert dataset.skipped == ["b.png"]
    assert "1 skipped: b.png (" in dataset.summary()
    for path in paths:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"no file could be decoded.*3 skipped"):
        dataset[0]


def test_long_lists_of_skipped_files_are_shortened(tmp_path):
    image(tmp_path / "good.png")
    for i in range(13):
        (tmp_path / f"bad{i:02}.png").write_bytes(b"?")
    dataset = FolderDataset(tmp_path, size=8)
    assert len(dataset.skipped) == 13
    assert dataset.summary().count("bad") >= 10
    assert dataset.summary().endswith("and 3 more.")


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.md").write_text("nothing here")
    (tmp_path / ".thumbnails").mkdir()
    image(tmp_path / ".thumbnails" / "a.png")
    with pytest.raises(ValueError, match=r"nothing to use among .*\.mp4.*\.png.* 0 videos, 0 images"):
        FolderDataset(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        FolderDataset(tmp_path / "absent")


@pytest.mark.parametrize(
    "wrong",
    [
        {"frame_stride": 2, "fps": 8},
        {"num_frames": 0},
        {"fps": 0},
        {"repeats": 2},
        {"size": 0},
        {"frame_stride": 0},
    ],
)
def test_wrong_arguments_are_errors(tmp_path, wrong):
    image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FolderDataset(tmp_path, **wrong)
    with pytest.raises(IndexError):
        FolderDataset(tmp_path)[1]


def test_a_crop_alone_is_exact_and_centred():
    frame = np.random.default_rng(0).integers(0, 256, (11, 20, 3), dtype=np.uint8)
    assert np.array_equal(fit(frame, (11, 20)), frame)
    assert np.array_equal(fit(frame, (11, 8)), frame[:, 6:14])
    assert np.array_equal(fit(frame, (5, 20)), frame[3:8])


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (64, 16), (7, 5)])
def test_resizing_takes_the_largest_window_of_the_shape(size):
    """A linear ramp over the frame stays one, from edge to edge of the window."""
    y, x = np.mgrid[:96, :160]
    frame = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    made = fit(frame, size).astype(float)
    scale = min(96 / size[0], 160 / size[1])
    assert made.shape == (*size, 3)
    for axis, (full, side) in enumerate(((160, size[1]), (96, size[0]))):
        ramp = made[size[0] // 2, :, 0] if axis == 0 else made[:, size[1] // 2, 1]
        wanted = full / 2 + (np.arange(side) + 0.5 - side / 2) * scale - 0.5
        assert np.abs(ramp - wanted)[1:-1].max() <= 1.5


def test_a_data_set_of_images_made_elsewhere(tmp_path):
    """Palettes, transparency and turned photographs come out as a viewer shows them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "palette.gif")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    made = {c.source: c.frames[0, ..., 0] for c in FolderDataset(tmp_path, size=16)}
    assert np.array_equal(made["grey.png"], ramp)
    assert np.array_equal(made["palette.gif"], ramp)
    assert np.array_equal(made["clear.png"], np.full((16, 16), 255))
    assert np.array_equal(made["turned.png"], np.rot90(ramp, -1))
