"""Batches made ahead by threads: the same ones, none too early, and errors where they belong."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from animatelcm import video
from animatelcm.data.batches import ClipBatch, draw_indices, pixel_batches, prefetched
from animatelcm.data.clips import FolderDataset
from animatelcm.data.emoji import EmojiImages


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        frames = np.random.default_rng(seed).integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
        video.write(frames, tmp_path / f"{seed}.mp4", fps=8)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_made_ahead_are_the_same_bit_for_bit(folder, workers):
    for data in (FolderDataset(folder, num_frames=4, size=32, seed=0, repeats=50), EmojiImages(length=50)):
        plain = pixel_batches(data)

        def drawn(number: int, plain=plain, data=data) -> ClipBatch:
            return plain(draw_indices(len(data), 3, seed=0, step=number, rank=0))

        with prefetched(drawn, 4, 10, workers) as batches:
            for number in range(4, 10):
                found, wanted = batches(number), drawn(number)
                assert (found.captions, found.sources) == (wanted.captions, wanted.sources)
                assert torch.equal(found.pixels, wanted.pixels)
            assert torch.equal(batches(5).pixels, drawn(5).pixels)  # once more, which nobody foresaw


def test_no_batch_is_made_too_early_or_in_vain():
    begun, leave = [], threading.Event()

    def drawn(number: int) -> int:
        begun.append(number)
        if number > 1:
            leave.wait(10)
        return number

    with prefetched(drawn, 0, 100, 2) as batches:
        assert [batches(0), batches(1)] == [0, 1]
        until = time.monotonic() + 10
        while len(begun) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        threading.Timer(0.3, leave.set).start()  # those in hand end when the others have been given up
    assert sorted(begun) == [0, 1, 2, 3]  # not the fourth, which waited
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize(("last", "made"), [(100, 5), (3, 3)])
def test_one_more_batch_than_threads_is_made_ahead_and_none_after_the_last(last, made):
    begun = []
    with prefetched(lambda number: begun.append(number) or number, 0, last, 2) as batches:
        assert [batches(0), batches(1)] == [0, 1]
        until = time.monotonic() + 10
        while len(begun) < made and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(begun) == list(range(made))


def test_what_fails_in_a_thread_is_said_where_the_batch_is_asked_for():
    def drawn(number: int) -> int:
        if number == 2:
            raise ValueError("b.mp4 is damaged; remake it")
        return number

    with prefetched(drawn, 0, 9, 2) as batches:
        assert [batches(0), batches(1)] == [0, 1]
        with pytest.raises(ValueError, match=r"^b\.mp4 is damaged; remake it$"):
            batches(2)
