"""Videos are read as they are, what is measured of them is measured once, and mixed ones are said."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from animatelcm import video
from animatelcm.evaluate import bootstrap
from animatelcm.evaluate.folders import reel
from animatelcm.evaluate.score import Score
from animatelcm.evaluate.viewing import Looks, kept_score, measured, mixtures, of_folders, read
from test_evaluate_ucf101 import avi


def film(path: Path, seed: int, *, frames: int = 3, height: int = 16, width: int = 24, fps: Fraction | int = 8) -> Path:
    source = np.random.default_rng(seed)
    pixels = source.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return video.write(pixels, path, fps=fps, quality=100 if path.suffix == ".webp" else None)


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed in range(3):
        film(tmp_path / "films" / f"{seed}.webp", seed)
    film(tmp_path / "films" / "9", 9, frames=4, height=20, fps=Fraction(24000, 1001))
    return tmp_path / "films"


def means(videos) -> torch.Tensor:
    return torch.tensor([float(frames.mean()) for frames in videos], dtype=torch.float64)


def test_frames_are_those_of_the_files(folder):
    looks, heard = Looks(), []
    options = {"frames": 2, "progress": lambda *said: heard.append(said)}
    for frames, file in zip(read(reel(folder), looks, **options), sorted(folder.iterdir()), strict=True):
        assert np.array_equal(frames, video.read(file, num_frames=2).frames)
    assert looks.sizes == {"24x16": 3, "24x20": 1}
    assert looks.rates == {"8": 3, "23.976": 1}
    assert heard == [(str(folder), number, 4) for number in (1, 2, 3, 4)]


def contents(folder: Path) -> str:
    looks = Looks()
    list(read(reel(folder), looks))
    return looks.contents


def test_the_same_bytes_have_one_name_whatever_they_are_called(folder):
    before = contents(folder)
    (folder / "0.webp").rename(folder / "z.webp")
    (folder / "9").rename(folder / "1")
    folder = folder.rename(folder.with_name("elsewhere"))
    assert contents(folder) == before
    (folder / "2.webp").unlink()
    film(folder / "2.webp", 77)
    assert contents(folder) != before


def test_a_video_that_fails_inside_ends_it_and_all_that_fail_are_counted(tmp_path):
    for name in ("a", "b", "c", "d"):
        avi(tmp_path / f"{name}.avi", 40)
    for name in ("b", "d"):
        data = (tmp_path / f"{name}.avi").read_bytes()
        (tmp_path / f"{name}.avi").write_bytes(data[: len(data) // 4])
    coming = read(reel(tmp_path), frames=40)
    assert next(coming).shape == (40, 24, 32, 3)
    with pytest.raises(ValueError, match=r"b\.avi.* \(2 of 4 videos in .* cannot be used\)"):
        next(coming)


def test_what_was_measured_is_not_measured_again(folder, tmp_path):
    calls = []

    def measure(videos):
        calls.append(1)
        return means(videos)

    def go(**facts):
        return measured(reel(folder), facts, measure, keep=tmp_path / "kept")

    first = go(weights="a")
    for again in (go(weights="a"), go(weights="a")):
        assert torch.equal(again[0], first[0])
        assert again[1] == first[1]
    assert len(calls) == 1
    torch.testing.assert_close(first[0], means(read(reel(folder))))
    go(weights="b")
    assert len(calls) == 2
    (folder / "1.webp").unlink()
    film(folder / "1.webp", 50)
    changed = go(weights="a")
    assert len(calls) == 3
    assert (changed[0] != first[0]).tolist() == [False, True, False, False]
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert torch.equal(go(weights="a")[0], changed[0])
    assert len(calls) == 4


def test_a_failure_keeps_nothing(folder, tmp_path):
    (folder / "2.webp").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"2\.webp"):
        measured(reel(folder), {}, means, keep=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def score(value: float) -> Score:
    ends = bootstrap.Interval(value - 1, value + 1, 0.1, 0.95, 10, 0)
    return Score(metric="M", value=value, interval=ends, n={"a": 2}, rank=None, facts={"n": [2], "name": "\u00e9"})


def test_a_score_is_kept_by_the_numbers_and_the_facts_that_it_is_of(tmp_path):
    numbers = [torch.arange(4.0), torch.ones(2, 2)]
    made = kept_score(tmp_path, {"a": 1}, numbers, lambda: score(3.25))
    assert made == score(3.25)
    assert kept_score(tmp_path, {"a": 1}, [x.clone() for x in numbers], lambda: score(0.0)) == made
    for facts, given in (({"a": 2}, numbers), ({"a": 1}, numbers[::-1]), ({"a": 1}, [numbers[0] + 1, numbers[1]])):
        assert kept_score(tmp_path, facts, given, lambda: score(7.0)).value == 7
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:-9])
    assert kept_score(tmp_path, {"a": 1}, numbers, lambda: score(8.0)).value == 8


def test_mixed_sizes_and_rates_are_told_with_their_counts():
    one = Looks(sizes={"64x64": 3}, rates={"8": 3})
    assert mixtures({"real": one, "made": one}) == []
    other = Looks(sizes={"64x64": 1, "512x512": 9}, rates={"8": 10})
    (said,) = mixtures({"real": one, "made": other})
    assert "sizes are mixed (real: 64x64 in 3; made: 512x512 in 9, 64x64 in 1)" in said
    many = Looks(rates={str(rate): 2 for rate in range(20, 25)})
    (said,) = mixtures({"real": many})
    assert "frame rates are mixed (real: 20 in 2, 21 in 2, 22 in 2, 2 others): frames are taken as they come" in said


def test_a_judge_sees_each_folder_once_and_in_full(folder, tmp_path):
    def judge(videos, about):
        return [score(float(means(videos).sum()))]

    film(tmp_path / "more" / "a.gif", 1)
    film(tmp_path / "more" / "b.gif", 2)
    with pytest.raises(ValueError, match=r"different counts of videos \(.*films 4, .*more 2\) do not compare"):
        of_folders(judge, [folder, tmp_path / "more"])
    found = of_folders(judge, [folder, tmp_path / "more", folder], mixed=True)
    assert list(found.scores) == [str(folder), str(tmp_path / "more")]
    assert found.scores[str(folder)][0].value == float(means(read(reel(folder))).sum())
    assert [said.split(" are")[0] for said in found.remarks] == ["sizes", "frame rates"]
    with pytest.raises(ValueError, match="nothing to measure"):
        of_folders(judge, [])
