"""UCF-101: the official names, draws that are what their address says, and sentences for every wrong folder.

The folder is a small one of the official layout, its videos MPEG-4 in AVI as theirs, frame i being grey of level 6 i.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from animatelcm.evaluate.report import facts_hash
from animatelcm.evaluate.ucf101 import (
    CAPTIONS,
    SETTINGS,
    Draw,
    clips,
    draws,
    prompts,
    read_draws,
    videos,
    write_draws,
)
from animatelcm.request import SampleRequest

LENGTHS = {
    "Archery/v_Archery_g01_c01.avi": 20,
    "Archery/v_Archery_g01_c02.avi": 16,
    "HandstandPushups/v_HandStandPushups_g01_c01.avi": 30,  # sic: the official files of this class have another S
    "YoYo/v_YoYo_g25_c03.avi": 24,
}


def avi(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 6 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(clip: np.ndarray) -> list[int]:
    return (clip.reshape(len(clip), -1).mean(axis=1) / 6).round().astype(int).tolist()


@pytest.fixture(scope="module")
def ucf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "UCF-101"
    for name, count in LENGTHS.items():
        avi(folder / name, count)
    return folder


# Names and captions


def test_the_classes_are_the_official_ones_in_their_order():
    """The digest is of the 101 names of ``classInd.txt``, a line each."""
    digest = "3ec3894f84996395754fb9c47fe6decb6a3a713ab4621a9ab090802e4f316525"
    assert len(CAPTIONS) == 101
    assert hashlib.sha256("\n".join(CAPTIONS).encode()).hexdigest() == digest
    assert list(CAPTIONS) == sorted(CAPTIONS, key=str.lower)


def test_every_caption_is_one_short_sentence_of_its_own():
    assert len(set(CAPTIONS.values())) == 101
    for caption in CAPTIONS.values():
        assert caption.isascii()
        assert caption[0].isupper()
        assert caption.endswith(".")
        assert caption.count(".") == 1
        assert 4 <= len(caption.split()) <= 12


# Real clips


def test_the_folder_and_the_one_around_it_are_both_read(ucf):
    assert videos(ucf) == videos(ucf.parent) == sorted(LENGTHS)


def test_the_clips_are_the_frames_that_were_drawn(ucf):
    for stride in (1, 2):
        drawn = draws(ucf, frames=7, seed=5, stride=stride)
        assert sorted(draw.file for draw in drawn.clips) == sorted(LENGTHS)
        for draw, clip in zip(drawn.clips, clips(ucf.parent, drawn), strict=True):
            assert clip.shape == (7, 24, 32, 3)
            assert clip.dtype == np.uint8
            assert levels(clip) == [draw.start + i * stride for i in range(7)]


def test_every_start_is_drawn_and_none_outside(ucf):
    seen = {file: set() for file in LENGTHS}
    for seed in range(200):
        for file, start in draws(ucf, seed=seed).clips:
            seen[file].add(start)
    assert {file: sorted(starts) for file, starts in seen.items()} == {
        file: list(range(count - 15)) for file, count in LENGTHS.items()
    }


def test_a_draw_is_its_address(ucf):
    drawn = draws(ucf, seed=3)
    assert drawn == draws(ucf, seed=3)
    assert drawn.clips[:2] == draws(ucf, 2, seed=3).clips
    assert any(draws(ucf, seed=seed).clips != drawn.clips for seed in (4, 5))


def test_a_new_file_shifts_no_other(ucf, tmp_path):
    for name, count in LENGTHS.items():
        avi(tmp_path / name, count)
    avi(tmp_path / "Surfing/v_Surfing_g02_c01.avi", 40)
    more = [draw for draw in draws(tmp_path, seed=3).clips if not draw.file.startswith("Surfing")]
    assert tuple(more) == draws(ucf, seed=3).clips


def test_three_videos_are_taken_and_said_not_to_compare(ucf):
    drawn = draws(ucf, 3)
    assert len(drawn.clips) == 3
    assert "3 clips of 16 frames from 4 videos, where the papers draw 2,048 of 16 from 13,320" in drawn.remark()
    assert draws(ucf, 2048).remark().startswith("4 clips")
    whole = replace(drawn, clips=drawn.clips[:1] * 2048, videos=13_320)
    assert whole.remark() == ""
    assert "not compare" in replace(whole, frames=8).remark()


def test_what_cannot_be_used_is_passed_over_and_named(ucf, tmp_path):
    for name, count in LENGTHS.items():
        avi(tmp_path / name, count)
    avi(tmp_path / "Diving/v_Diving_g01_c01.avi", 15)
    (tmp_path / "Diving/v_Diving_g01_c02.avi").write_bytes(b"no video")
    (tmp_path / "Diving/._v_Diving_g01_c01.avi").write_bytes(b"another system's")
    (tmp_path / "Diving/notes.txt").write_text("?")
    drawn = draws(tmp_path, seed=3)
    assert drawn.clips == draws(ucf, seed=3).clips
    assert sorted(drawn.skipped) == ["Diving/v_Diving_g01_c01.avi", "Diving/v_Diving_g01_c02.avi"]
    assert drawn.skipped["Diving/v_Diving_g01_c01.avi"] == "15 frames, 16 are needed"
    assert "Invalid data" in drawn.skipped["Diving/v_Diving_g01_c02.avi"]
    with pytest.raises(ValueError, match=r"none of the 6 videos .* can be used, e.g. .*frames, 99 are needed"):
        draws(tmp_path, frames=99)


def test_a_video_that_ends_early_is_named_when_it_is_read(tmp_path):
    path = avi(tmp_path / "YoYo/v_YoYo_g01_c01.avi", 40)
    drawn = draws(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    with pytest.raises(ValueError, match=r"v_YoYo_g01_c01\.avi"):
        list(clips(tmp_path, drawn))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "holds none of the 101 classes of UCF-101 but nothing"),
        (["videos/a.avi"], "but videos; give a folder with UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"),
        (["Archery/a.avi"], "hold no videos"),
        (["Archery/v_Archery_g01_c01.mp4"], "hold no videos"),
    ],
)
def test_another_layout_is_said(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=said):
        draws(tmp_path)


def test_wrong_arguments_are_errors(ucf, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        draws(tmp_path / "absent")
    for wrong in ({"n": 0}, {"frames": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match="1 at least"):
            draws(ucf, **wrong)


# The official lists


def test_the_official_lists_are_read_with_labels_and_without(ucf, tmp_path):
    first, *rest = sorted(LENGTHS)
    for name in LENGTHS:
        avi(tmp_path / "UCF-101" / name, 16)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("".join(f"{name} {i + 1}\r\n" for i, name in enumerate(rest)))
    (lists / "testlist01.txt").write_text(f"{first}\n")
    for folder in (tmp_path, tmp_path / "UCF-101"):
        assert videos(folder, "train1") == rest
        assert videos(folder, "test1") == [first]
    drawn = draws(tmp_path, split="test1")
    assert drawn.clips == (Draw(first, 0),)
    assert (drawn.split, drawn.videos) == ("test1", 1)
    (lists / "testlist02.txt").write_text(f"{first}\nYoYo/v_YoYo_g01_c01.avi\n")
    with pytest.raises(ValueError, match=r"1 of 2 videos of the list test2 are not in .*v_YoYo_g01_c01\.avi"):
        videos(tmp_path, "test2")
    with pytest.raises(ValueError, match=r"there is no ucfTrainTestlist/testlist03\.txt"):
        videos(tmp_path, "test3")
    with pytest.raises(ValueError, match="choose train1, train2"):
        videos(tmp_path, "validation")


# The record


def test_draws_are_read_as_they_were_written(ucf, tmp_path):
    drawn = draws(ucf, 3, seed=9)
    write_draws(drawn, tmp_path / "draws.json")
    assert read_draws(tmp_path / "draws.json") == drawn
    for text in ("", "[]", "{}", '{"clips": [[1]]}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json holds no draws"):
            read_draws(tmp_path / "broken.json")


def test_the_facts_of_other_clips_hash_otherwise(ucf):
    several = [draws(ucf), draws(ucf, seed=1), draws(ucf, 3), draws(ucf, frames=8), draws(ucf, stride=1)]
    assert len({facts_hash(drawn.facts()) for drawn in several}) == 4


# What is to be generated


def test_the_papers_rows_are_24_of_every_class():
    rows = prompts(seed=7)
    assert len(rows) == 2424
    assert set(Counter(row["prompt"] for row in rows).values()) == {24}
    assert len({row["file"] for row in rows}) == 2424
    assert [row["seed"] for row in rows] == list(range(7, 7 + 2424))
    assert all(CAPTIONS[row["file"].split("-")[0]] == row["prompt"] for row in rows)


@pytest.mark.parametrize("n", [1, 100, 101, 102, 250, 1000])
def test_fewer_rows_are_the_first_and_as_even(n):
    rows = prompts(n)
    assert rows == prompts()[:n]
    counts = Counter(row["prompt"] for row in rows)
    assert max(counts.values()) - min(counts.values() if n >= 101 else [0, 1]) <= 1


def test_rows_are_requests():
    row = prompts(1, settings={**SETTINGS, "num_inference_steps": 2})[0]
    assert SampleRequest(**{key: value for key, value in row.items() if key != "file"}).shape == (16, 512, 512)
    with pytest.raises(ValueError, match="1 at least"):
        prompts(0)
