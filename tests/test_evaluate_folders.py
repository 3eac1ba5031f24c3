"""Folders of videos: what is found in them, what is drawn, whose prompts are known, and sentences for all others."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from animatelcm import images, video
from animatelcm.evaluate.folders import check, chosen, prompted, reel


def film(path: Path, frames: int = 2, prompt: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.full((frames, 16, 16, 3), len(path.name), np.uint8)
    return video.write(grey, path, fps=8, metadata={} if prompt is None else {"prompt": prompt})


@pytest.fixture
def place(tmp_path) -> Path:
    """Videos of every kind, and what is none."""
    folder = tmp_path / "place"
    for name in ("b.mp4", "a.GIF", "deep/er/c.webp", "deep/sequence"):
        film(folder / name)
    for name in ("notes.txt", "manifest.json", ".hidden.mp4", ".cache/x.mp4", "sheet.png", "deep/clips-0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("?")
    return folder


NAMES = ["a.GIF", "b.mp4", "deep/er/c.webp", "deep/sequence"]


def names(folder: Path, **options) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in reel(folder, **options).files]


def test_every_video_is_found_once_by_name(place):
    assert names(place) == NAMES
    assert [header.num_frames for header in check(reel(place), 2)] == [2] * 4


def test_a_list_is_read_from_where_it_lies(place, tmp_path):
    table = tmp_path / "list.txt"
    table.write_text(f"\ufeffplace/deep/sequence\r\n\n  {place / 'b.mp4'} \nplace/b.mp4\n", encoding="utf-8")
    assert reel(table).files == (place / "deep/sequence", place / "b.mp4")


def test_a_draw_is_of_the_names_wherever_they_lie(tmp_path):
    for root in ("one", "two/place"):
        for number in range(12):
            (tmp_path / root).mkdir(parents=True, exist_ok=True)
            (tmp_path / root / f"{number:02}.mp4").touch()
    few, more = (names(tmp_path / "one", limit=n, seed=5) for n in (4, 8))
    assert few == sorted(few)
    assert set(few) < set(more)
    assert names(tmp_path / "two" / "place", limit=4, seed=5) == few
    assert any(names(tmp_path / "one", limit=4, seed=seed) != few for seed in (6, 7))
    assert names(tmp_path / "one", limit=99) == names(tmp_path / "one")


def test_choosing_is_a_fair_draw_without_repeats():
    files = [f"{i:02}.mp4" for i in range(20)]
    picked = [chosen(files, 5, seed) for seed in range(400)]
    assert all(len(set(one)) == 5 for one in picked)
    counts = Counter(file for one in picked for file in one)
    assert all(60 < counts[file] < 140 for file in files)  # 100 each, standard deviation 8.7
    assert sorted(chosen(files, 50)) == files
    assert chosen(files[::-1], 5) == chosen(files, 5)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "holds no videos; files ending in .avi, .gif"),
        (["x.txt", ".y.mp4"], "holds no videos"),
        (["x.mp4"], "holds a single video, x.mp4"),
    ],
)
def test_folders_with_too_little_are_said(tmp_path, files, said):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=said):
        reel(tmp_path)


def test_places_that_are_none_are_said(place, tmp_path):
    with pytest.raises(ValueError, match=r"absent does not exist; give a folder of videos, or a \.txt"):
        reel(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"b\.mp4 is a file; give a folder"):
        reel(place / "b.mp4")
    with pytest.raises(ValueError, match="limit=1 videos are too few"):
        reel(place, 1)
    table = tmp_path / "list.txt"
    for text, said in (
        (b"", "lists no videos"),
        (b"place/b.mp4\nno.mp4\nnor.mp4\n", r"2 of 3 videos of the list .* are not there, e\.g\. .*no\.mp4"),
        (b"\xff\xfe\x00", "cannot read .*list.txt"),
    ):
        table.write_bytes(text)
        with pytest.raises(ValueError, match=said):
            reel(table)


def test_videos_that_cannot_be_used_are_counted_and_the_first_is_named(place):
    (place / "b.mp4").write_bytes(b"<html>not a video</html>")
    (place / "deep/er/c.webp").write_bytes((place / "deep/er/c.webp").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot read .*b\.mp4 .*\(2 of 4 videos in .*place cannot be used\)"):
        check(reel(place))
    with pytest.raises(ValueError, match=r"a\.GIF has 2 frames, and 16 are needed; leave it out \(4 of 4"):
        check(reel(place), 16)


def test_numbered_pictures_of_others_are_not_passed_over_in_silence(tmp_path):
    film(tmp_path / "a.mp4")
    images.write_image(np.zeros((4, 4, 3), np.uint8), tmp_path / "frames" / "0001.png")
    with pytest.raises(ValueError, match=r"cannot read .*frames .*metadata\.json"):
        check(reel(tmp_path))


# Prompts


def test_recipes_in_the_files_say_what_was_asked(tmp_path):
    for name, prompt in (("b.mp4", "a fox"), ("c/a.webp", "a cat"), ("sequence", "")):
        film(tmp_path / name, prompt=prompt)
    found = prompted(tmp_path)
    assert dict(zip([file.name for file in found.files], found.prompts, strict=True)) == {
        "b.mp4": "a fox",
        "a.webp": "a cat",
        "sequence": "",
    }
    film(tmp_path / "z.gif")
    with pytest.raises(ValueError, match=r"1 of 4 videos do not say .* e\.g\. .*z\.gif; give a folder of animatelcm"):
        prompted(tmp_path)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_manifest_says_more_than_the_files_do(tmp_path):
    for name in ("000000.mp4", "000002.mp4", "other.mp4"):
        film(tmp_path / name, prompt="the file's")
    rows = [{"row": 0, "prompt": "old", "error": "?"}, {"row": 0, "prompt": "a fox", "file": "000000.mp4"}]
    rows += [{"row": 1, "prompt": "a dog", "error": "?"}, {"row": 2, "prompt": "a cat", "file": "000002.mp4"}]
    lines(tmp_path / "manifest.jsonl", *rows, '{"row": 3, "fi')
    found = prompted(tmp_path)
    assert [file.name for file in found.files] == ["000000.mp4", "000002.mp4"]
    assert found.prompts == ("a fox", "a cat")
    assert len(found.remarks) == 1
    assert "1 of 3 rows of the batch failed" in found.remarks[0]
    (tmp_path / "000000.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 videos of the manifest .* are not there, e\.g\. .*000000\.mp4"):
        prompted(tmp_path)
    lines(tmp_path / "manifest.jsonl", *rows[2:])
    with pytest.raises(ValueError, match="has 1 videos with prompts"):
        prompted(tmp_path)
    lines(tmp_path / "manifest.jsonl", rows[0])
    with pytest.raises(ValueError, match="tells of no video that was made"):
        prompted(tmp_path)


def test_a_table_says_most_of_all(place, tmp_path):
    rows = [{"file": name, "prompt": f"prompt of {name}", "seed": 3} for name in reversed(NAMES)]
    found = prompted(place, lines(tmp_path / "t.jsonl", rows[0], "", *rows[1:]))
    assert [file.relative_to(place).as_posix() for file in found.files] == NAMES[::-1]
    assert found.prompts == tuple(f"prompt of {name}" for name in NAMES[::-1])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"file": name, "prompt": "a fox"} for name in NAMES[1:]], r"1 of 4 videos have no prompt in .*a\.GIF"),
        ([{"file": name, "prompt": "a fox"} for name in [*NAMES, "z.mp4"]], r"1 of 5 videos of the file .*z\.mp4"),
        ([{"file": "a.GIF"}], r"t\.jsonl, line 1: .*'prompt'"),
        ([{"file": "a.GIF", "prompt": "a fox"}, "a.gif a fox"], r"t\.jsonl, line 2: "),
        (["[1]"], "line 1"),
        ([], "4 of 4 videos have no prompt"),
    ],
)
def test_a_table_that_does_not_fit_is_said(place, tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        prompted(place, lines(tmp_path / "t.jsonl", *rows))


def test_a_table_that_is_not_there_is_said(place, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.jsonl"):
        prompted(place, tmp_path / "absent.jsonl")
