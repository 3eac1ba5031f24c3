"""Latents that are kept: however they were made, in one go, by several, or in two lives, they are the same."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from safetensors import safe_open

from animatelcm.data import latents
from animatelcm.data.emoji import EmojiImages
from animatelcm.data.latents import encode_pieces, kept_batches, place

DATA = EmojiImages(length=11)
PIECE = {"piece": 4, "at_a_time": 2}


def _encode(pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(pixels, (1, 8, 8)).sin()


def _same(paths, others) -> bool:
    """Bit for bit; files may name captions and sources in either order."""
    one, other = (kept_batches(each)(range(len(DATA))) for each in (paths, others))
    said = (one.captions, one.sources) == (other.captions, other.sources)
    return said and len(paths) == len(others) and torch.equal(one.latents, other.latents)


@pytest.fixture
def whole(tmp_path):
    return encode_pieces(DATA, _encode, tmp_path / "whole", **PIECE)


def test_latents_come_back_in_any_order_with_their_captions_and_sources(whole):
    batch = kept_batches(whole)([10, 0, 5, 5])
    clips = [DATA[i] for i in (10, 0, 5, 5)]
    assert batch.captions == tuple(clip.caption for clip in clips)
    assert batch.sources == tuple(clip.source for clip in clips)
    pixels = torch.stack([torch.from_numpy(clip.frames) for clip in clips]).permute(0, 4, 1, 2, 3)
    wanted = _encode(pixels.float() / 127.5 - 1)
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, wanted.half().float())
    assert [path.name for path in whole] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    with safe_open(str(whole[2]), framework="pt") as file:
        assert file.get_slice("latents").get_shape() == [3, 3, 1, 8, 8]


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_a_process_that_was_killed_goes_on_where_it_was(whole, tmp_path, calls):
    class KilledError(Exception):
        pass

    left = calls

    def dying(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return _encode(pixels)

    with pytest.raises(KilledError):
        encode_pieces(DATA, dying, tmp_path / "parts", **PIECE)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*")}
    assert len(kept) == calls // 2  # two calls a piece, and nothing by halves
    again = []
    paths = encode_pieces(DATA, lambda p: (again.append(len(p)), _encode(p))[1], tmp_path / "parts", **PIECE)
    assert sum(again) == len(DATA) - 4 * len(kept)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert _same(paths, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_several_processes_make_what_one_makes(whole, tmp_path, workers):
    """Each encodes its own, and leaves when all are there."""
    encoded, found = {0: 0, 1: 0}, {}

    def work(rank: int) -> None:
        def mine(pixels: torch.Tensor) -> torch.Tensor:
            encoded[rank] += len(pixels)
            return _encode(pixels)

        options = {"rank": rank, "processes": 2, "workers": workers, **PIECE}
        found[rank] = encode_pieces(DATA, mine, tmp_path / "both", **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert encoded == {0: 4 + 3, 1: 4}
    assert found[0] == found[1]
    assert _same(found[0], whole)


def test_others_are_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PATIENCE", 0.3)
    monkeypatch.setattr(latents, "_POLL", 0.01)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"00001\.safetensors, which another process encodes, has not appeared"):
        encode_pieces(DATA, _encode, tmp_path / "both", rank=0, processes=2, **PIECE)
    assert 0.3 <= time.monotonic() - began < 5
    encode_pieces(DATA, _encode, tmp_path / "both", rank=1, processes=2, **PIECE)  # and nothing was lost


def test_progress_counts_what_is_there_by_whomever(tmp_path):
    said = []
    encode_pieces(DATA, _encode, tmp_path / "a", **PIECE, progress=lambda done, total: said.append((done, total)))
    assert said == sorted(said)
    assert said[-1] == (11, 11)
    assert {total for _, total in said} == {11}
    (tmp_path / "a" / "00001.safetensors").unlink()
    said.clear()
    encode_pieces(DATA, _encode, tmp_path / "a", **PIECE, progress=lambda done, total: said.append((done, total)))
    assert said[0][0] >= 7


def test_other_facts_have_another_place(tmp_path):
    assert place(tmp_path, "folder", "x") == place(tmp_path, "folder", "x")
    assert place(tmp_path, "folder", "x") != place(tmp_path, "folder", "y")
    assert place(tmp_path, "folder", "x").name.startswith("folder-")
