"""FVD: what the network sees of a video, and the distance with all that it depends on."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from animatelcm.evaluate.fvd import features, fvd, pixels
from animatelcm.evaluate.i3d import Detector


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
