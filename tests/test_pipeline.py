"""The door of diffusers' users: lists of prompts, generators, names of arguments that are nearly right."""

from __future__ import annotations

import warnings

import pytest
import torch

from animatelcm import Pipeline
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample
from test_condition import clip

SMALL = {"num_frames": 2, "num_inference_steps": 1, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe(fresh_model):
    return Pipeline(fresh_model)


def _alone(pipe: Pipeline, prompt: str, seed: int, negative: str = ""):
    (video,) = sample(pipe.model, SampleRequest(prompt=prompt, negative_prompt=negative, seed=seed, **SMALL))
    return video


def test_a_list_of_prompts_gives_its_videos_in_order(pipe):
    made = pipe(["a fox", "a parrot"], seed=7, num_videos_per_prompt=2, **SMALL)
    asked = [(video.request.prompt, video.request.seed) for video in made]
    assert asked == [("a fox", 7), ("a fox", 8), ("a parrot", 9), ("a parrot", 10)]
    for video in made:
        alone = _alone(pipe, video.request.prompt, video.request.seed)
        assert abs(video.frames.astype(int) - alone.frames).max() <= 1  # rounding of a batch
    assert pipe(["a fox"], **SMALL)[0].request == pipe("a fox", **SMALL)[0].request


def test_a_negative_prompt_is_one_for_all_or_one_for_each(pipe):
    prompts = ["a fox", "a parrot"]
    for negative, each in (("red", ["red", "red"]), (["red", "blue"], ["red", "blue"])):
        made = pipe(prompts, negative_prompt=negative, **SMALL)
        assert [video.request.negative_prompt for video in made] == each
        assert [video.request.prompt for video in made] == prompts
    (video,) = pipe("a fox", negative_prompt="red", **SMALL)
    assert (video.frames == _alone(pipe, "a fox", 0, "red").frames).all()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prompt": []}, "0 prompts"),
        ({"prompt": ["a"], "negative_prompt": ["a", "b"]}, "1 prompts and 2 negative ones"),
        ({"prompt": ["a", 3]}, "3 is none"),
        ({"prompt": "a", "generator": 3}, "generator is a int"),
        ({"prompt": "a", "generator": [torch.Generator()]}, "generator is a list"),
        ({"prompt": "a", "generator": torch.Generator(), "seed": 3}, "generator and seed are one setting"),
        ({"prompt": ["a", "b"], "seed": 2**63 - 1}, "for 2 videos, which count on from it; choose 0..2\\*\\*63 - 2"),
        ({"prompt": ["a", "b"], "seed": 2**63 - 3, "num_videos_per_prompt": 2}, "for 4 videos"),
    ],
)
def test_what_cannot_be_is_a_sentence_before_anything_is_made(pipe, given, named, monkeypatch):
    monkeypatch.setattr("animatelcm.pipeline.drafts", lambda *_, **__: pytest.fail("it was sampled"))
    with pytest.raises(ValueError, match=named):
        pipe(**given, **SMALL)


def test_a_generators_seed_of_64_bits_loses_one(pipe):
    (video,) = pipe("a fox", generator=torch.Generator().manual_seed(2**64 - 5), **SMALL)
    assert video.request.seed == 2**63 - 5


def test_a_generator_gives_its_seed(pipe):
    source = torch.Generator().manual_seed(11)
    made = [pipe("a fox", generator=source, **SMALL)[0] for _ in range(2)]
    assert [video.request.seed for video in made] == [11, 11]
    assert (made[0].frames == pipe("a fox", seed=11, **SMALL)[0].frames).all()
    assert (made[0].frames != pipe("a fox", seed=12, **SMALL)[0].frames).any()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_numbers_have_either_name(fresh_folder, name):
    pipe = Pipeline.from_pretrained(str(fresh_folder), **{name: torch.bfloat16})
    assert pipe.model.unet.dtype == torch.bfloat16
    (video,) = pipe("a fox", **SMALL)
    assert video.precision == "bf16"


def test_two_kinds_of_numbers_are_a_sentence():
    with pytest.raises(ValueError, match="are one setting"):
        Pipeline.from_pretrained("nowhere", dtype=torch.float16, torch_dtype=torch.float32)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_step", "num_inference_steps"),
        ("guidance", "guidance_scale"),
        ("steps", "num_inference_steps"),
        ("negative_prompts", "negative_prompt"),
        ("num_frame", "num_frames"),
        ("ip_adapter_image", "image"),
        ("conditioning_frames", "control"),
    ],
)
def test_an_unknown_argument_of_a_call_names_the_nearest_known(pipe, wrong, right):
    with pytest.raises(TypeError, match=f"a pipeline takes no argument '{wrong}'; did you mean '{right}'"):
        pipe("a fox", **{wrong: 3})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("motion_adapter", "motion"),
        ("lora", "loras"),
        ("style", "loras"),
        ("model", "source"),
        ("torchdtype", "torch_dtype"),
        ("devise", "device"),
        ("image_scales", "image_scale"),
    ],
)
def test_an_unknown_argument_of_loading_names_the_nearest_known(wrong, right):
    with pytest.raises(TypeError, match=f"from_pretrained takes no argument '{wrong}'; did you mean '{right}'"):
        Pipeline.from_pretrained("nowhere", **{wrong: 3})


def test_what_is_like_nothing_lists_what_is_known(pipe):
    with pytest.raises(TypeError, match=r"no argument 'qqq'; it takes .*num_frames.*prompt"):
        pipe("a fox", qqq=1)


def test_what_changes_nothing_is_warned_of_where_it_was_asked_for(pipe):
    small = {**SMALL, "guidance_scale": 1.0}
    with pytest.warns(UserWarning, match="negative_prompt changes nothing") as caught:
        pipe("a fox", negative_prompt="red", **small)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="strength changes nothing") as caught:
        sample(pipe.model, SampleRequest(prompt="a fox", strength=0.3, **small))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a fox", video=clip(), strength=0.5, **small)
