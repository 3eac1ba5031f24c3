from __future__ import annotations

import math

import pytest

from animatelcm.request import SampleRequest
from animatelcm.schedule import NoiseSchedule
from animatelcm.weights.families import FAMILIES, Family, family_of

BETAS = ("beta_schedule", "beta_start", "beta_end", "solver_steps")


def schedule(family: Family) -> NoiseSchedule:
    return NoiseSchedule(**{name: getattr(family, name) for name in BETAS})


@pytest.mark.parametrize(
    ("name", "sigma"),
    [("stable-diffusion-1.5", 14.6), ("animatediff-v3", 25.1), ("animatelcm-t2v", 25.1), ("animatelcm-i2v", 41.7)],
)
def test_the_noisiest_step_is_as_noisy_as_published(name, sigma):
    last = schedule(family_of(name)).alphas_cumprod[-1].item()
    assert math.sqrt((1 - last) / last) == pytest.approx(sigma, abs=0.05)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("animatelcm-t2v", [999, 749, 499, 249]),
        ("animatelcm-i2v", [999, 749, 499, 249]),
        ("lcm-lora", [999, 759, 499, 259]),
    ],
)
def test_four_steps_visit_the_timesteps_of_the_authors(name, grid):
    family = family_of(name)
    assert schedule(family).lcm_timesteps(family.num_inference_steps).tolist() == grid


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_can_be_sampled_as_it_recommends(family):
    names = ("num_inference_steps", "guidance_scale", "sampler")
    request = SampleRequest(prompt="a cat", **{name: getattr(family, name) for name in names})
    assert (request.sampler == "lcm") == (family.guidance_scale == 1)
    steps = family.num_inference_steps
    visited = (
        schedule(family).lcm_timesteps(steps) if family.sampler == "lcm" else schedule(family).ddim_timesteps(steps)
    )
    assert len(set(visited.tolist())) == steps
    assert 0 < family.lora_scale <= 1
    assert family.source
    assert "http" not in family.source


def test_families_are_found_by_name_and_others_are_explained():
    assert all(family_of(name).name == name for name in FAMILIES)
    assert len({family.title for family in FAMILIES.values()}) == len(FAMILIES)
    with pytest.raises(ValueError, match=r"'sdxl' is not known.*animatelcm-t2v"):
        family_of("sdxl")
