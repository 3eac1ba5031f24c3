"""FVD: what the network sees of a video, and the distance with all that it depends on."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from animatelcm.evaluate.fvd import features, fvd, of_folders, pixels
from animatelcm.evaluate.i3d import Detector
from animatelcm.video import read, write


def videos(count, frames=16, height=20, width=24, seed=0):
    source = np.random.default_rng(seed)
    return [source.integers(0, 256, (frames, height, width, 3), dtype=np.uint8) for _ in range(count)]


def detector(logits=None, **facts):
    """Means of 400 places in place of logits."""
    blocks = logits or (lambda x: torch.nn.functional.adaptive_avg_pool3d(x, (4, 10, 10))[:, 0].flatten(1))
    return Detector(blocks, torch.device("cpu"), {"network": "stand-in", "weights": "w1", **facts})


def points(n, seed, shift=0.0):
    return torch.randn(n, 400, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("size", [(64, 64), (256, 341), (224, 300), (512, 512)])
def test_pixels_are_opencvs_bilinear_ones(size):
    """Which has half-pixel centres and no antialiasing."""
    (video,) = videos(1, 16, *size)
    seen = pixels(video)
    assert seen.shape == (3, 16, 224, 224)
    expected = cv2.resize(video[5].astype(np.float32), (224, 224), interpolation=cv2.INTER_LINEAR) / 127.5 - 1
    np.testing.assert_allclose(seen[:, 5].permute(1, 2, 0).numpy(), expected, atol=2e-3)


def test_a_third_of_the_size_is_every_third_pixel():
    """Neither antialiasing nor aligned corners would give that."""
    (video,) = videos(1, 16, 672, 672)
    expected = torch.from_numpy(video[:, 1::3, 1::3]).permute(3, 0, 1, 2) / 127.5 - 1
    torch.testing.assert_close(pixels(video), expected)


def test_black_and_white_are_the_ends():
    ramp = np.zeros((16, 224, 224, 3), np.uint8)
    ramp[:, :, 100:] = 255
    seen = pixels(ramp)
    assert (seen.min(), seen.max()) == (-1, 1)


def test_the_first_sixteen_frames_count():
    (video,) = videos(1, 40)
    assert torch.equal(pixels(video), pixels(video[:16]))
    assert not torch.equal(pixels(video[1:]), pixels(video))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_features_come_in_order_whatever_the_batch_and_the_sizes(batch):
    several = [*videos(3), *videos(2, 18, 30, 10, seed=1)]
    seen = []

    def logits(x):
        seen.append(len(x))
        return detector().logits(x)

    found = features(detector(logits), iter(several), batch=batch)
    assert found.shape == (5, 400)
    assert max(seen) == min(batch, 5)
    for row, video in zip(found, several, strict=True):
        torch.testing.assert_close(row, detector().logits(pixels(video)[None])[0])


def test_videos_are_taken_as_they_come():
    """No more than a batch is held: the second batch is not asked for before the first is through."""
    taken, through = [], []

    def stream():
        for number, video in enumerate(videos(6)):
            taken.append(number)
            yield video

    def logits(x):
        through.append(len(taken))
        return torch.zeros(len(x), 400)

    features(detector(logits), stream(), batch=2)
    assert through == [2, 4, 6]


def test_no_videos_give_no_features():
    assert features(detector(), []).shape == (0, 400)


def test_a_short_video_is_named():
    with pytest.raises(ValueError, match="video 2: 15 frames are too few for FVD; give 16"):
        features(detector(), [*videos(2), *videos(1, 15)])
    with pytest.raises(ValueError, match=r"c\.mp4: 15 frames"):
        features(detector(), [*videos(2), *videos(1, 15)], names=["a.mp4", "b.mp4", "c.mp4"])
    with pytest.raises(ValueError, match="video 1: uint8"):
        features(detector(), [videos(1)[0], videos(1)[0].astype(np.float32)])


def test_a_video_whose_logits_are_no_numbers_is_named():
    calls = []

    def logits(x):
        calls.append(x)
        out = torch.zeros(len(x), 400)
        out[-1, 7] = torch.nan if len(calls) == 2 else 0
        return out

    with pytest.raises(ValueError, match="video 3: its logits are NaN"):
        features(detector(logits), videos(5), batch=2)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 600\), not \(N, 400\)"):
        features(detector(lambda x: torch.zeros(len(x), 600)), videos(1))


def test_the_same_videos_moved_are_at_the_square():
    x = points(30, seed=0)
    score = fvd(x, x + 0.5, detector(), resamples=4)
    assert score.value == pytest.approx(400 * 0.25, rel=1e-5)
    assert (score.metric, score.n, score.rank) == (
        "FVD",
        {"real": 30, "generated": 30},
        {"real": 29, "generated": 29},
    )


def test_a_score_has_its_interval():
    score = fvd(points(60, 0), points(50, 1, 0.2), detector(), resamples=20)
    assert score.interval.low < score.value < score.interval.high
    assert score.interval.bias > 0
    again = fvd(points(60, 0), points(50, 1, 0.2), detector(), resamples=20)
    assert again == score


def test_the_protocol_is_named_by_all_that_it_depends_on_and_nothing_else():
    def protocol(n=5, m=5, about=None, seed=0, shift=0.0, **facts):
        return fvd(points(n, 0), points(m, 1, shift), detector(**facts), about=about, seed=seed, resamples=2).protocol

    about = {"real": "UCF-101", "seed": 3, "fps": 8}
    others = [protocol(), protocol(n=6), protocol(m=6), protocol(weights="w2"), protocol(epsilon=1e-3)]
    others += [protocol(about=about), protocol(about={**about, "seed": 4})]
    assert len(set(others)) == 7
    assert protocol(seed=9) == protocol(shift=2.0) == protocol()


def test_what_a_caller_tells_cannot_hide_what_is_known():
    assert fvd(points(4, 0), points(5, 1), detector(), about={"metric": "x"}, resamples=2).facts["metric"] == "FVD"


# Folders


@pytest.fixture
def places(tmp_path):
    """Three folders of clips, 5, 5 and 4."""
    for number, (name, count) in enumerate((("real", 5), ("good", 5), ("few", 4))):
        for index, clip in enumerate(videos(count, 17, seed=number)):
            write(clip, tmp_path / name / f"{index}.webp", fps=8, quality=100)
    return tmp_path


def test_folders_have_the_distance_of_their_videos(places):
    real, good = ([read(file).frames for file in sorted((places / name).iterdir())] for name in ("real", "good"))
    (score,) = of_folders(detector(), places / "real", [places / "good"]).scores[str(places / "good")]
    expected = fvd(
        features(detector(), real), features(detector(), good), detector(), about={"real": score.facts["real"]}
    )
    assert score == expected
    assert score.rank == {"real": 4, "generated": 4}


def test_folders_are_at_no_distance_from_themselves(places):
    found = of_folders(detector(), places / "real", [places / "real"])
    assert found.scores[str(places / "real")][0].value == pytest.approx(0, abs=1e-9)


def test_few_videos_and_their_ranks_are_remarked(places):
    found = of_folders(detector(), places / "real", [places / "good"])
    assert found.remarks == [
        f"{places / 'good'}: n = 5 where papers use 2,048: not comparable with their figures",
        f"{places / 'good'}: covariances of rank real 4, generated 4, not 400: the fewer videos, the larger the figure",
    ]


def test_several_folders_share_a_protocol_or_are_said_to_be_mixed(places):
    several = [places / "good", places / "few"]
    with pytest.raises(ValueError, match="different counts of videos"):
        of_folders(detector(), places / "real", several)
    scores = of_folders(detector(), places / "real", several, mixed=True).scores
    assert len({score.protocol for (score,) in scores.values()}) == 2
    scores = of_folders(detector(), places / "real", several, limit=4).scores
    assert len({score.protocol for (score,) in scores.values()}) == 1
    other = of_folders(detector(), places / "few", [places / "good"], limit=4).scores[str(places / "good")]
    assert other[0].protocol != scores[str(places / "good")][0].protocol  # of other real videos


def test_a_second_run_asks_the_network_nothing(places):
    seen = []

    def logits(x):
        seen.append(len(x))
        return detector().logits(x)

    def go(*names):
        folders = [places / name for name in names]
        return of_folders(detector(logits), places / "real", folders, mixed=True, keep=places / "kept")

    first = go("good")
    assert sum(seen) == 10
    assert go("good") == first
    assert sum(seen) == 10
    assert go("good", "few").scores[str(places / "good")] == first.scores[str(places / "good")]
    assert sum(seen) == 14


def test_a_file_whose_logits_are_no_numbers_is_named(places):
    def logits(x):
        return torch.full((len(x), 400), torch.nan if len(x) == 1 else 0)  # the fifth is alone in its batch

    with pytest.raises(ValueError, match=r"real/4\.webp: its logits are NaN"):
        of_folders(detector(logits), places / "real", [places / "good"])
