"""Where memory is short frames come in smaller pieces, and latents outlive what fails after them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from animatelcm import decoding, memory
from animatelcm.decoding import whole
from test_condition import clip
from test_decoding import SOURCE, at_once, draft, near

# Too little memory


def _limited(model, monkeypatch, most: int, calls: list[tuple[int, ...]]) -> None:
    """Decoding more than ``most`` cells at once is too much."""
    decode = model.vae.decode

    def limited(x):
        calls.append((len(x), *x.shape[2:]))
        if x[:, 0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(x)

    monkeypatch.setattr(model.vae, "decode", limited)


@pytest.mark.parametrize(
    ("own", "most", "tried"),
    [
        (False, 16 * 64, [16, 4]),
        (False, 15 * 64, [16, 4, 4, 4, 4, 4]),
        (False, 64, [16, 4, *[1] * 20]),
        (True, 16 * 64, [4, 4, 4, 4, 4]),
        (True, 64, [4, *[1] * 20]),
    ],
)
def test_chunks_shrink_once_and_the_video_is_the_same(fresh_model, monkeypatch, own, most, tried):
    plain = at_once(fresh_model, draft(fresh_model))
    monkeypatch.setattr(memory, "has_own_memory", lambda _: own)
    calls: list[tuple[int, ...]] = []
    _limited(fresh_model, monkeypatch, most, calls)
    assert near(whole(fresh_model, draft(fresh_model)).frames, plain)
    assert [n for n, *_ in calls] == tried


def _limited_to_bands(model, monkeypatch, most: int) -> list[int]:
    """Whole frames are too much, and so are more than ``most`` pixels of the last layer."""
    _limited(model, monkeypatch, 0, [])
    last, seen = model.vae.decoder.conv_out.forward, []

    def limited(x):
        seen.append(x.shape[2] * x.shape[3])
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return last(x)

    monkeypatch.setattr(model.vae.decoder.conv_out, "forward", limited)
    return seen


@pytest.mark.parametrize(("most", "bands"), [(128 * 34, 4), (128 * 10, 16)])
def test_then_come_bands_and_the_video_is_the_same(fresh_model, monkeypatch, caplog, most, bands):
    made = draft(fresh_model, 2, 128, 128)
    expected = whole(fresh_model, made).frames
    seen = _limited_to_bands(fresh_model, monkeypatch, most)
    assert near(whole(fresh_model, made).frames, expected)
    assert sum(cells <= most for cells in seen) == 2 * bands
    assert f"1 frames at a time, in {bands} bands" in caplog.text


def test_then_the_others_wait_and_whole_frames_are_tried_again(fresh_model, monkeypatch):
    model = replace(fresh_model)
    there = torch.device("cpu", 0)
    monkeypatch.setattr(memory, "has_own_memory", lambda _: True)
    monkeypatch.setattr(type(model), "device", property(lambda self: self.runs_on or there))
    made, turns, decode = draft(model, 2, 128, 128), [], model.vae.decode
    expected = whole(model, made).frames

    def full_beside_others(x):
        turns.append((len(x), *x.shape[2:], model.runs_on is not None))
        if model.runs_on is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(x)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.vae, "decode", full_beside_others)
    monkeypatch.setattr("animatelcm.model.decode_in_bands", full)
    assert near(whole(model, made).frames, expected)
    assert turns == [
        *[(2, 16, 16, False), (1, 16, 16, False)],
        *[(1, 16, 16, True), (1, 16, 16, True)],
    ]
    assert model.runs_on is None


@pytest.mark.parametrize(
    ("most", "said"), [(32 * 8, "any number of frames of 32x32 fits"), (0, "end what else uses it")]
)
def test_at_last_one_sentence_says_what_fits(fresh_model, monkeypatch, most, said):
    _limited_to_bands(fresh_model, monkeypatch, most)
    with pytest.raises(ValueError, match=rf"^cpu has too little memory to decode even one frame of 128x128; {said}$"):
        whole(fresh_model, draft(fresh_model, 3, 128, 128))


# Latents that are kept


def test_latents_outlive_a_decoder_that_fails_and_are_decoded_later(fresh_model, tmp_path, monkeypatch):
    made = draft(fresh_model, 3, picture=clip(1)[0])
    target, kept = tmp_path / "my clip.webp", tmp_path / "my clip.latents.safetensors"
    with monkeypatch.context() as patch:
        _limited_to_bands(fresh_model, patch, 0)
        with pytest.raises(ValueError, match="too little memory") as caught, decoding.rescued(made, target, SOURCE):
            decoding.write(fresh_model, made, target, source=SOURCE)
    words = f"animatelcm decode '{kept}' --model some/model --decoder tiny --out '{target}'"
    assert str(caught.value).endswith(f"its latents are in {kept}; this goes on from there: {words}")
    assert list(tmp_path.iterdir()) == [kept]
    again = decoding.load(kept, fresh_model)
    assert torch.equal(again.latents, made.latents)
    assert (again.picture == made.picture).all()
    same = ("request", "model", "fps", "evaluations", "seconds")
    assert all(getattr(again, name) == getattr(made, name) for name in same)
    assert (whole(fresh_model, again).frames == whole(fresh_model, made).frames).all()


def test_errors_that_are_no_users_stay_what_they_are(fresh_model, tmp_path):
    with pytest.raises(KeyError) as caught, decoding.rescued(draft(fresh_model, 1), tmp_path / "frames", SOURCE):
        raise KeyError("ours")
    assert "frames.latents.safetensors" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("CUDA error: an illegal memory access")])
def test_a_full_disk_or_a_failed_device_keeps_the_first_error(fresh_model, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(decoding, "save", full)
    with (
        pytest.raises(ValueError, match=rf"the first; its latents could not be kept either \({error}\)"),
        decoding.rescued(draft(fresh_model, 1), tmp_path / "a.mp4", SOURCE),
    ):
        raise OSError("the first")


def test_other_files_and_other_models_are_refused(fresh_model, tmp_path):
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1)}, tmp_path / "x.latents.safetensors")
    with pytest.raises(ValueError, match="holds no latents of a video"):
        decoding.load(tmp_path / "x.latents.safetensors", fresh_model)
    decoding.save(draft(fresh_model, 2), tmp_path / "y.latents.safetensors")
    config = SimpleNamespace(latent_channels=4, block_out_channels=(1, 1, 1, 1))
    other = replace(fresh_model, vae=SimpleNamespace(config=config))
    with pytest.raises(ValueError, match=r"latents \(1, 16, 2, 8, 8\) of 'mine'.*--model"):
        decoding.load(tmp_path / "y.latents.safetensors", other)
