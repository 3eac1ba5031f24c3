from __future__ import annotations

import numpy as np
import pytest
import torch

from animatelcm.request import SampleRequest
from animatelcm.sampling import initial_noise, sample, sample_steps


def _request(**fields) -> SampleRequest:
    return SampleRequest(
        **{"prompt": "a parrot", "num_frames": 4, "num_inference_steps": 3, "guidance_scale": 1.0} | fields
    )


def test_each_video_depends_on_its_own_seed_alone(fresh_model):
    three = sample(fresh_model, _request(seed=5, num_videos_per_prompt=3))
    alone = sample(fresh_model, _request(seed=6))[0]
    assert [video.request.seed for video in three] == [5, 6, 7]
    assert (three[1].frames == alone.frames).all()
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
    from dataclasses import replace

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
