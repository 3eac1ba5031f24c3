from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from animatelcm.bundle import load
from animatelcm.colour import aligned
from animatelcm.condition import Condition, Control
from animatelcm.data.batches import to_pixels
from animatelcm.request import SampleRequest
from animatelcm.sampling import initial_noise, sample, sample_steps
from test_condition import beside, clip


def _request(**fields) -> SampleRequest:
    return SampleRequest(
        **{"prompt": "a parrot", "num_frames": 4, "num_inference_steps": 3, "guidance_scale": 1.0} | fields
    )


def test_each_video_depends_on_its_own_seed_alone(fresh_model):
    three = sample(fresh_model, _request(seed=5, num_videos_per_prompt=3))
    alone = sample(fresh_model, _request(seed=6))[0]
    assert [video.request.seed for video in three] == [5, 6, 7]
    assert np.abs(three[1].frames.astype(int) - alone.frames).max() <= 1  # a batch may round otherwise
    assert (three[0].frames != alone.frames).any()


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_sampler_takes_its_steps(fresh_model, sampler, steps):
    previews = list(sample_steps(fresh_model, _request(sampler=sampler, num_inference_steps=steps)))
    assert [preview.step for preview in previews] == list(range(1, steps + 1))
    assert torch.isfinite(previews[-1].latents).all()


def test_guidance_one_is_the_plain_network_and_costs_one_evaluation(fresh_model):
    plain, guided = sample(fresh_model, _request())[0], sample(fresh_model, _request(guidance_scale=3.0))[0]
    assert (plain.evaluations, guided.evaluations) == (3, 6)
    assert (plain.frames != guided.frames).any()
    # with the empty text on both sides guidance changes nothing
    same = [sample(fresh_model, _request(prompt="", guidance_scale=g))[0].frames.astype(int) for g in (1.0, 7.0)]
    assert np.abs(same[0] - same[1]).max() <= 1


def test_the_negative_prompt_matters_with_guidance_only(fresh_model):
    def frames(**fields):
        return sample(fresh_model, _request(**fields))[0].frames

    assert (frames(negative_prompt="a fox") == frames()).all()
    assert (frames(negative_prompt="a fox", guidance_scale=4.0) != frames(guidance_scale=4.0)).any()


def test_given_latents_are_used(fresh_model):
    request = _request().resolved(fresh_model.facts)
    noise = initial_noise(fresh_model, request)
    assert (sample(fresh_model, request, latents=noise)[0].frames == sample(fresh_model, request)[0].frames).all()
    assert (sample(fresh_model, request, latents=-noise)[0].frames != sample(fresh_model, request)[0].frames).any()


def test_the_caller_keeps_its_grad_mode(fresh_model):
    for _ in sample_steps(fresh_model, _request(num_inference_steps=2)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_one_frame_is_the_image_model(fresh_model):
    from animatelcm.nets.unet import VideoUNet

    image = VideoUNet(fresh_model.unet.config, None)
    image.load_state_dict({k: v for k, v in fresh_model.unet.state_dict().items() if "motion_modules" not in k})
    plain = replace(fresh_model, unet=image)
    request = _request(num_frames=1)
    assert (sample(plain, request)[0].frames == sample(fresh_model, request)[0].frames).all()


def test_diffusers_lcm_scheduler_walks_the_same_way(fresh_model):
    """Same network, same noise: our consistency sampler against diffusers' LCMScheduler."""
    from diffusers import LCMScheduler

    from animatelcm.rng import generator

    request = _request(sampler="lcm", num_inference_steps=4).resolved(fresh_model.facts)
    ours = list(sample_steps(fresh_model, request))[-1].latents
    config = fresh_model.schedule.to_diffusers("LCMScheduler")
    scheduler = LCMScheduler.from_config(config)
    scheduler.set_timesteps(4)
    x, text = initial_noise(fresh_model, request), fresh_model.embed([request.prompt])
    with torch.inference_mode():
        for step, t in enumerate(scheduler.timesteps):
            source = generator(request.seed, step + 1, 0, "latents")
            x = scheduler.step(fresh_model.unet(x, t.expand(1), text), t, x, generator=source).prev_sample
    assert (x - ours).abs().max() < 1e-4 * ours.abs().max()


# What steers: pictures, layouts, videos


@pytest.fixture(scope="module")
def steered(fresh_model):
    return beside(fresh_model)


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_whatever_steers_changes_the_video_under_every_sampler(steered, sampler, guidance):
    short = {"num_frames": 2, "num_inference_steps": 2}
    request = _request(sampler=sampler, guidance_scale=guidance, colour_match=0.0, strength=0.7, **short)
    plain = sample(steered, request, condition=Condition())[0]
    for condition in (
        Condition(image=clip(2)[0]),
        Condition(controls=(Control("edge", clip(2)),)),
        Condition(controls=(Control("pose", clip(2)),)),
        Condition(video=clip(2)),
    ):
        made = sample(steered, request, condition=condition)[0]
        assert made.frames.shape == plain.frames.shape
        assert (made.frames != plain.frames).any()
    assert (
        sample(steered, request, condition=Condition(controls=(Control("pose", clip(2), 0.0),)))[0].frames
        == plain.frames
    ).all()


def test_colours_come_from_the_picture_at_the_end(steered):
    def frames(share: float) -> np.ndarray:
        return sample(steered, _request(colour_match=share), condition=Condition(image=clip()[0]))[0].frames

    assert (frames(0.6) == aligned(frames(0.0), clip()[0], 0.6)).all()


def _walked(model, request, condition) -> tuple[list[int], torch.Tensor]:
    """Timesteps at which the network is asked, and the latents that it is given first."""
    seen: list[tuple[int, torch.Tensor]] = []
    hook = model.unet.register_forward_pre_hook(lambda _, given: seen.append((int(given[1][0]), given[0].clone())))
    list(sample_steps(model, request, condition=condition))
    hook.remove()
    return [t for t, _ in seen], seen[0][1]


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.35, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_a_video_is_begun_from_where_diffusers_begins(fresh_model, sampler, steps, strength):
    """StableDiffusionImg2ImgPipeline.get_timesteps; where that has no step left, ours takes the last."""
    from types import SimpleNamespace

    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

    kind = DDIMScheduler if sampler == "ddim" else DPMSolverMultistepScheduler
    scheduler = kind.from_config(fresh_model.schedule.to_diffusers())
    scheduler.set_timesteps(steps)
    pipe = SimpleNamespace(scheduler=scheduler)
    expected, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    request = _request(sampler=sampler, num_inference_steps=steps, strength=strength, num_frames=1)
    times, first = _walked(fresh_model, request, Condition(video=clip(1)))
    assert times == (expected.tolist() or scheduler.timesteps[-1:].tolist())
    with torch.inference_mode():
        latents = fresh_model.encode(to_pixels([clip(1)]))
    noise = initial_noise(fresh_model, request.resolved(fresh_model.facts))
    noisy = DDIMScheduler.from_config(fresh_model.schedule.to_diffusers()).add_noise(
        latents, noise, torch.tensor(times[:1])
    )
    torch.testing.assert_close(first, noisy, atol=1e-4, rtol=0)


def test_few_steps_are_spread_over_what_strength_leaves(fresh_model):
    request = _request(sampler="lcm", num_inference_steps=4, strength=0.5, num_frames=1)
    times, _ = _walked(fresh_model, request, Condition(video=clip(1)))
    assert times == fresh_model.schedule.lcm_timesteps(4, 0.5).tolist() == [499, 379, 259, 139]
    whole, _ = _walked(fresh_model, replace(request, strength=1.0), Condition(video=clip(1)))
    assert whole == _walked(fresh_model, request, Condition())[0] == [999, 759, 499, 259]


def test_evaluations_are_those_that_were_made(fresh_model):
    for sampler, steps in (("ddim", 6), ("dpm++", 6), ("lcm", 10)):
        request = _request(sampler=sampler, num_inference_steps=10, strength=0.6, num_frames=1, guidance_scale=2.0)
        assert sample(fresh_model, request, condition=Condition(video=clip(1)))[0].evaluations == 2 * steps


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "dpm++"])
def test_a_tiny_strength_keeps_the_clip(sampler):
    """The shipped model, whose autoencoder means something: as good as the autoencoder alone."""
    model = load("emoji", teacher=sampler != "lcm")
    with torch.inference_mode():
        kept = model.decode(model.encode(to_pixels([clip()])))[0]

    def psnr(strength: float) -> float:
        request = _request(sampler=sampler, num_inference_steps=1, strength=strength)
        request = replace(request, num_inference_steps=25 if sampler != "lcm" else 1)
        made = sample(model, request, condition=Condition(video=clip()))[0].frames
        return float(10 * np.log10(255**2 / np.mean((made.astype(float) - kept) ** 2)))

    assert psnr(0.04) > 30
    assert psnr(0.04) > psnr(0.4) + 3


def test_a_video_to_begin_from_is_encoded_once_in_as_much_memory_as_there_is(fresh_model, monkeypatch, caplog):
    """However many videos begin from it, a group at a time."""
    request = _request(strength=0.5, num_videos_per_prompt=3)
    plain = sample(fresh_model, request, condition=Condition(video=clip()))
    asked, encode = [], fresh_model.encode

    def short(pixels: torch.Tensor, chunk: int = 32) -> torch.Tensor:
        asked.append(chunk)
        if chunk > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")
        return encode(pixels, chunk)

    monkeypatch.setattr(fresh_model, "encode", short)
    monkeypatch.setattr("animatelcm.sampling._together", lambda *_: 1)
    made = sample(fresh_model, request, condition=Condition(video=clip()))
    assert asked == [16, 4, 1]
    assert "4 frames at a time" in caplog.text
    for one, other in zip(made, plain, strict=True):
        assert np.abs(one.frames.astype(int) - other.frames).max() <= 1
    monkeypatch.setattr(fresh_model, "encode", lambda pixels, chunk: short(pixels, 2))
    with pytest.raises(ValueError, match=r"cpu has too little memory to encode even one frame of 64x64; choose"):
        sample(fresh_model, request, condition=Condition(video=clip()))


def test_a_strength_with_too_few_timesteps_left_is_one_sentence(fresh_model):
    request = _request(sampler="lcm", num_inference_steps=4, strength=0.05)
    with pytest.raises(ValueError, match=r"^strength=0\.05 leaves 2 of the 50 timesteps .* 0\.08 at least$"):
        sample(fresh_model, request, condition=Condition(video=clip()))
