"""Data of a run: which frames are taken, what is checked before anything is encoded, what kept latents depend on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from animatelcm import recipes, sources, video
from animatelcm.config import AdapterConfig, DataConfig, TrainConfig
from animatelcm.sources import open_dataset, open_source


def _clip(count: int, first: int = 0) -> np.ndarray:
    """Frame i is a plain grey of level 5 (first + i)."""
    grey = (5 * (first + np.arange(count))).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, 64, 64, 3))


def _numbers(frames: np.ndarray) -> list[int]:
    return (frames.reshape(len(frames), -1).mean(1) / 5).round().astype(int).tolist()


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        video.write(_clip(24), tmp_path / "clips" / f"{name}.webp", fps=24, quality=100)
        (tmp_path / "clips" / f"{name}.txt").write_text(f"clip {name}")
    return tmp_path / "clips"


def _of(folder, **changes) -> DataConfig:
    return DataConfig(kind="folder", path=folder, **({"num_frames": 4} | changes))


def _run(data: DataConfig, out, adapter: str | None = None) -> TrainConfig:
    base = replace(recipes.teacher_emoji(), sample_prompts=(), out=out)
    if adapter is None:
        return replace(base, data=data)
    return replace(base, data=data, trainable="adapter", adapter=AdapterConfig(name=adapter, kind="t2i_adapter"))


def test_temporal_layers_learn_from_no_folder_of_images(folder, fresh_model, tmp_path):
    (folder / "stills" / "deeper").mkdir(parents=True, exist_ok=True)
    video.write_image(np.zeros((64, 64, 3), np.uint8), folder / "stills" / "a.png")
    with pytest.raises(ValueError, match="stills holds images, and temporal layers learn from clips; give a folder"):
        open_source(_run(_of(folder / "stills"), tmp_path), fresh_model)


def test_the_frames_of_a_clip_are_those_asked_for(folder):
    for stride in (1, 4, 7):
        wanted = [0, stride, 2 * stride, 3 * stride]
        assert [_numbers(clip.frames) for clip in open_dataset(_of(folder, frame_stride=stride))] == [wanted] * 3
    assert _numbers(open_dataset(_of(folder, fps=8))[0].frames) == [0, 3, 6, 9]
    shown = [_numbers(clip.frames) for clip in open_dataset(_of(folder, window="random", frame_stride=2, repeats=9))]
    assert len(shown) == 27
    assert len({numbers[0] for numbers in shown}) > 5
    assert all(numbers == list(range(numbers[0], numbers[0] + 8, 2)) for numbers in shown)
    other = open_dataset(_of(folder, window="random", frame_stride=2, repeats=9, seed=1))
    assert [_numbers(clip.frames) for clip in other] != shown


def test_a_caption_column_is_the_one_asked_for(folder):
    rows = [{"file_name": "a.webp", "text": "short", "long": "a long story"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_dataset(_of(folder))[0].caption == "short"
    assert open_dataset(_of(folder, caption_column="long"))[0].caption == "a long story"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"frame_stride": 0}, "frame_stride=0"),
        ({"fps": 8.0, "frame_stride": 2}, "and a stride of 1"),
        ({"fps": -1.0}, "fps above 0"),
        ({"repeats": 3}, "window random"),
        ({"workers": -1}, "workers=-1"),
        ({"num_frames": 0}, "num_frames=0"),
        (
            {"kind": "emoji-clips", "path": None, "frame_stride": 4},
            'frame_stride is for the files of data.kind "folder"',
        ),
        ({"kind": "emoji-clips", "path": None, "maps": "x"}, "data.maps is for"),
    ],
)
def test_what_no_clip_can_be_is_refused(folder, wrong, said):
    with pytest.raises(ValueError, match=said):
        _of(folder, **wrong) if "kind" not in wrong else DataConfig(**wrong)


def test_an_older_run_reads_as_it_was(folder):
    """A config without the newer fields is today's default of them, and threads do not make another run."""
    kept = json.loads(_run(_of(folder), folder).to_json())
    for name in ("frame_stride", "fps", "window", "repeats", "caption_column", "maps", "workers"):
        del kept["data"][name]
    config = TrainConfig.from_json(json.dumps(kept))
    assert config == _run(_of(folder), folder)
    assert config.data == replace(config.data, workers=7)
    assert config.data != replace(config.data, frame_stride=2)


# Ready maps


def _maps_beside(folder, count: int = 24):
    maps = folder.parent / "maps"
    for name in "ab":
        video.write(_clip(count, first=20), maps / f"{name}.gif", fps=10)
    video.write(_clip(count, first=20), maps / "c.webp", fps=10, quality=100)
    return maps


@pytest.mark.parametrize("cache", [False, True])
def test_ready_maps_are_those_of_the_clips_own_frames(folder, fresh_model, tmp_path, cache):
    maps = _maps_beside(folder)
    data = _of(folder, window="random", repeats=4, frame_stride=3, maps=maps, cache=cache)
    source = open_source(_run(data, tmp_path, "pose"), fresh_model)
    indices = [0, 4, 11, 7]
    batch = source.batches(indices)
    assert batch.maps.shape == (4, 3, 4, 64, 64)
    for row, index in enumerate(indices):
        shown = _numbers(source.dataset[index].frames)
        of_maps = (batch.maps[row].permute(1, 2, 3, 0) * 255).round().numpy()
        assert _numbers(of_maps) == [20 + number for number in shown]
    assert batch.captions == tuple(f"clip {'abc'[index % 3]}" for index in indices)


def test_maps_go_with_the_clip_that_stands_in_for_a_damaged_one(folder, fresh_model, tmp_path):
    """What could not be decoded when latents were made is not told apart later but by the sources that were kept."""
    for name, level in (("a", 5), ("b", 10), ("c", 15)):
        video.write_image(np.full((64, 64, 3), level, np.uint8), folder / "stills" / f"{name}.png")
        video.write_image(np.full((64, 64, 3), 100 + level, np.uint8), folder / "maps" / f"{name}.png")
    raw = bytearray((folder / "stills" / "b.png").read_bytes())
    raw[raw.index(b"IDAT") + 6] ^= 0xFF
    (folder / "stills" / "b.png").write_bytes(raw)
    for _ in range(2):  # encoded, and read again
        config = _run(_of(folder / "stills", num_frames=1, maps=folder / "maps"), tmp_path, "depth")
        source = open_source(config, fresh_model)
        batch = source.batches([0, 1, 2])
        assert source.dataset.skipped == ["b.png"]
        assert batch.sources == ("a.png", "c.png", "c.png")
        assert (batch.maps * 255).round().amax((1, 2, 3, 4)).tolist() == [105, 115, 115]


def test_maps_may_end_where_no_clip_goes_on(folder, fresh_model, tmp_path):
    data = _of(folder, frame_stride=3, maps=_maps_beside(folder, 10))
    assert open_source(_run(data, tmp_path, "pose"), fresh_model).batches([0]).maps.shape == (1, 3, 4, 64, 64)
    with pytest.raises(ValueError, match=r"3 of 3 .*\(10 frames, 13 are needed"):
        open_source(_run(replace(data, frame_stride=4), tmp_path, "pose"), fresh_model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda maps: (maps / "b.gif").unlink(), r"1 of 3 clips.* first b\.webp \(0 files\)"),
        (lambda maps: [file.unlink() for file in list(maps.iterdir())], r"3 of 3 clips.* first a\.webp \(0 files\)"),
        (lambda maps: video.write(_clip(5), maps / "b.gif", fps=10, overwrite=True), r"b\.webp \(5 frames, 24 are"),
        (lambda maps: (maps / "a.png").write_bytes(b""), r"a\.webp \(2 files\)"),
        (lambda maps: (maps / "b.gif").write_bytes(b"no gif"), r"1 of 3 .*b\.webp \("),
    ],
)
def test_maps_that_are_missing_are_named_before_anything_is_encoded(folder, fresh_model, tmp_path, change, said):
    maps = _maps_beside(folder)
    change(maps)
    with pytest.raises(ValueError, match=said):
        open_source(_run(_of(folder, window="random", maps=maps), tmp_path, "pose"), fresh_model)
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_made_is_found_before_anything_is_encoded(folder, fresh_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"depth maps cannot be made from frames.*data\.maps"):
        open_source(_run(_of(folder), tmp_path, "depth"), fresh_model)
    with pytest.raises(ValueError, match="trains nothing that reads maps"):
        open_source(_run(_of(folder, maps=folder), tmp_path), fresh_model)
    with pytest.raises(ValueError, match="no folder"):
        open_source(_run(_of(folder, maps=folder / "absent"), tmp_path, "pose"), fresh_model)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="needs OpenCV"):
        open_source(_run(_of(folder), tmp_path, "canny"), fresh_model)
    assert not (tmp_path / "cache").exists()


# Latents that are kept


def test_a_copy_of_a_folder_keeps_its_latents_and_a_change_does_not(folder, tmp_path):
    facts = sources.described(_of(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    for file in moved.iterdir():
        file.touch()
    (moved / ".hidden").write_text("nothing")
    assert sources.described(_of(moved, workers=3, cache=False)) == facts
    for change in ({"frame_stride": 2}, {"fps": 8.0}, {"window": "random"}, {"width": 32}, {"caption_column": "text"}):
        assert sources.described(_of(moved, **change)) != facts
    (moved / "a.txt").write_text("clip b")
    assert sources.described(_of(moved)) != facts


def test_large_files_are_told_apart_by_both_ends_and_captions_by_all_of_them(tmp_path):
    def differs(name: str, place: int) -> bool:
        data = bytearray(300_000)
        (tmp_path / name).write_bytes(data)
        before = sources.described(_of(tmp_path))
        data[place] ^= 1
        (tmp_path / name).write_bytes(data)
        return sources.described(_of(tmp_path)) != before

    assert [differs("a.mp4", place) for place in (0, 60_000, 240_000, 299_999)] == [True] * 4
    assert not differs("a.mp4", 150_000)  # which is the price of not reading it
    assert differs("metadata.jsonl", 150_000)


def test_a_decoder_that_learns_on_keeps_the_latents(fresh_model, tmp_path):
    config = _run(DataConfig(kind="emoji-clips", length=2), tmp_path)
    open_source(config, fresh_model)
    made = {path.name.partition("-")[0]: path for path in (tmp_path / "cache").iterdir()}
    assert sorted(made) == ["emoji", "texts"]
    state = {name: value.clone() for name, value in fresh_model.vae.state_dict().items()}
    try:
        with torch.no_grad():
            fresh_model.vae.decoder.conv_in.weight.add_(1)
        open_source(config, fresh_model)
        assert set((tmp_path / "cache").iterdir()) == set(made.values())
        with torch.no_grad():
            fresh_model.vae.encoder.conv_in.weight.add_(1)
        open_source(config, fresh_model)
        assert len(list((tmp_path / "cache").iterdir())) == 3  # other latents, of the same texts
    finally:
        fresh_model.vae.load_state_dict(state)


def test_less_memory_means_fewer_frames_at_a_time(fresh_model, tmp_path, monkeypatch):
    tried = []
    ordinary = type(fresh_model).encode

    def scarce(model, pixels, chunk=32):
        tried.append(chunk)
        if chunk > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        return ordinary(model, pixels, chunk)

    config = _run(DataConfig(kind="emoji-clips", length=3), tmp_path / "a")
    wanted = open_source(replace(config, out=tmp_path / "b"), fresh_model).batches([2, 0, 1]).latents
    monkeypatch.setattr(type(fresh_model), "encode", scarce)
    found = open_source(config, fresh_model).batches([2, 0, 1]).latents
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)  # kept in fp16
    assert tried == [32, 16, 8, 8]  # what did not fit is not tried again

    def none_fits(model, pixels, chunk=32):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(fresh_model), "encode", none_fits)
    with pytest.raises(ValueError, match="too little memory to encode one frame"):
        open_source(replace(config, out=tmp_path / "c"), fresh_model)


def test_threads_help_where_files_are_decoded_at_each_step(folder, fresh_model, tmp_path):
    def workers(data: DataConfig, adapter: str | None = None) -> int:
        return open_source(_run(data, tmp_path, adapter), fresh_model).workers

    assert workers(_of(folder)) == 0  # kept latents
    assert workers(_of(folder, cache=False)) == 2
    assert workers(_of(folder, cache=False, workers=0)) == 0
    assert workers(_of(folder), "tile") == 2
    config = _run(_of(folder), tmp_path, "tile")
    seeing = replace(config, adapter=AdapterConfig(sees="pixels"))
    assert open_source(seeing, fresh_model).workers == 2
    assert open_source(replace(seeing, adapter=AdapterConfig()), fresh_model).workers == 0
    assert workers(DataConfig(kind="emoji-clips", length=2, cache=False)) == 0
    assert workers(DataConfig(kind="emoji-clips", length=2, workers=3)) == 3


def test_a_run_with_threads_is_the_run_without_bit_for_bit(folder, tmp_path):
    from animatelcm.training import train

    for workers in (0, 2):
        data = _of(folder, window="random", repeats=20, num_frames=1, cache=False, workers=workers)
        config = replace(recipes.vae_emoji(), out=tmp_path / str(workers), data=data, steps=3, batch_size=1)
        train(replace(config, sample_prompts=()))
    one, other = (load_file(tmp_path / f"{n}/vae_emoji/checkpoints/step-00000003/weights.safetensors") for n in (0, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("decoder" in name for name in one)
