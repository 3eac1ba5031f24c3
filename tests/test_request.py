from __future__ import annotations

import shlex

import pytest

from animatelcm.model import Facts
from animatelcm.request import SampleRequest, command

FACTS = Facts(name="x", width=64, height=64, num_frames=16, num_inference_steps=25, guidance_scale=4.0)


def test_what_is_not_said_comes_from_the_model():
    full = SampleRequest(prompt="a", num_frames=8).resolved(FACTS)
    assert (full.num_frames, full.width, full.num_inference_steps, full.guidance_scale) == (8, 64, 25, 4.0)
    assert full.sampler == "ddim"
    assert full.resolved(FACTS) == full


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0),
        ("num_frames", 65),
        ("width", -8),
        ("guidance_scale", 0.5),
        ("guidance_scale", float("nan")),
        ("sampler", "euler"),
        ("seed", -1),
        ("num_videos_per_prompt", 0),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SampleRequest(prompt="a", **{field: value})


def test_sides_must_fit_the_latent_grid():
    with pytest.raises(ValueError, match="nearest is 64"):
        SampleRequest(prompt="a", width=60).resolved(FACTS)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match="num_steps"):
        SampleRequest(prompt="a", num_steps=4)


def test_the_command_says_the_request_again():
    import tyro

    from animatelcm.cli import Generate

    request = SampleRequest(prompt="a 'parrot' $x", negative_prompt="bad; rm", seed=3).resolved(FACTS)
    words = shlex.split(command(request, "emoji"))
    assert words[:2] == ["animatelcm", "generate"]
    again = tyro.cli(Generate, args=words[2:])
    from animatelcm.cli import _sized

    assert _sized(again.request, again.size).resolved(FACTS) == request
