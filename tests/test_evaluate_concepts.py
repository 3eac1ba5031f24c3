"""Nearest centroid: arithmetic on made-up vectors, then real artwork."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from animatelcm.data.emoji import EmojiImages
from animatelcm.data.sprites import SpritePack
from animatelcm.evaluate.concepts import ConceptClassifier, centroids, nearest, soften

FEW = ("parrot", "banana", "rocket", "zebra", "red-heart", "umbrella")


def cloud(directions, noise, copies, seed):
    source = torch.Generator().manual_seed(seed)
    points = directions.repeat_interleave(copies, dim=0)
    return points + noise * torch.randn(points.shape, generator=source)


def test_points_around_directions_find_their_direction():
    directions = torch.eye(7, 16)
    points = cloud(directions, 0.1, 5, seed=0)
    truth = torch.arange(7).repeat_interleave(5)
    names, means = centroids(points, truth.tolist())
    assert names == list(range(7))
    assert torch.equal(nearest(cloud(directions, 0.1, 5, seed=1), means), truth)


def test_lengths_do_not_matter():
    points = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    stretch = torch.linspace(0.1, 10, 20)[:, None]
    groups = [i % 4 for i in range(20)]
    (names, means), (_, stretched) = centroids(points, groups), centroids(points * stretch, groups)
    torch.testing.assert_close(stretched, means)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(4))
    assert torch.equal(nearest(points * stretch, means * 3), nearest(points, means))
    assert names == [0, 1, 2, 3]


def test_a_group_of_one_is_its_own_nearest():
    points = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    _, means = centroids(points, list("abcdefghi"))
    assert torch.equal(nearest(points, means), torch.arange(9))


def test_softening_is_a_gaussian_of_the_given_width():
    frames = np.zeros((1, 41, 33, 3), np.uint8)
    frames[0, 20, 16] = 255
    seen = soften(soften(frames, 0), 1.5)[0, :, :, 1].astype(float)
    y, x = np.mgrid[-20:21, -16:17]
    expected = 255 / (2 * np.pi * 1.5**2) * np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    np.testing.assert_allclose(seen, expected, atol=1)
    plain = np.full((2, 8, 8, 3), (10, 128, 250), np.uint8)
    assert np.array_equal(soften(plain, 2), plain)


@pytest.fixture(scope="module")
def classifier():
    return ConceptClassifier(SpritePack(), FEW)


def test_images_of_the_pack_are_recognised(classifier):
    one_each = [EmojiImages(length=6, seed=99, concepts=(slug,)) for slug in FEW]
    frames = np.concatenate([data[i].frames for data in one_each for i in range(6)])
    truth = np.arange(len(FEW)).repeat(6)
    assert (classifier.predict(frames) == truth).mean() >= 0.9  # chance: 0.17


def test_the_order_of_concepts_only_renames(classifier):
    frames = EmojiImages(length=4, seed=5, concepts=FEW)
    frames = np.concatenate([frames[i].frames for i in range(4)])
    backwards = ConceptClassifier(classifier.pack, FEW[::-1])
    assert np.array_equal(backwards.predict(frames), len(FEW) - 1 - classifier.predict(frames))
