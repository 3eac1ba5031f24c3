from __future__ import annotations

import shlex
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animatelcm import images, request
from animatelcm.model import Facts
from animatelcm.model_source import ModelSource
from animatelcm.provenance import command, recipe
from animatelcm.request import ControlSource, SampleRequest, parse_size, unused

FACTS = Facts(name="x", width=64, height=64, num_frames=16, num_inference_steps=25, guidance_scale=4.0)


def test_what_is_not_said_comes_from_the_model():
    full = SampleRequest(prompt="a", num_frames=8).resolved(FACTS)
    assert (full.num_frames, full.width, full.num_inference_steps, full.guidance_scale) == (8, 64, 25, 4.0)
    assert full.sampler == "ddim"
    assert full.resolved(FACTS) == full


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40))
@settings(deadline=None)
def test_a_split_asks_for_the_same_videos(total, most, seed):
    whole = SampleRequest(prompt="a", seed=seed, num_videos_per_prompt=total)
    parts = whole.split(most)
    assert all(1 <= part.num_videos_per_prompt <= most for part in parts)
    assert [single for part in parts for single in part.singles()] == whole.singles()
    assert [single.seed for single in whole.singles()] == list(range(seed, seed + total))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0),
        ("num_frames", 10_001),
        ("context_length", 0),
        ("noise", "white"),
        ("width", -8),
        ("guidance_scale", 0.5),
        ("guidance_scale", float("nan")),
        ("sampler", "euler"),
        ("seed", -2),
        ("fps", 0),
        ("fps", float("nan")),
        ("motion_scale", -0.1),
        ("motion_scale", float("nan")),
        ("colour_match", 1.1),
        ("strength", -0.1),
        ("strength", float("nan")),
        ("fit", "squeeze"),
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


def _parsed(words):
    import tyro

    from animatelcm.verbs import Generate

    return tyro.cli(Generate, args=words)


def test_the_command_says_the_request_again():
    from animatelcm.verbs import _sized

    request = SampleRequest(prompt="a 'parrot' $x", negative_prompt="bad; rm", seed=3, guidance_scale=1 / 0.3)
    request = request.resolved(FACTS)
    source = ModelSource(
        model="a folder/x", style=("soft:0.8", "it's.safetensors"), image_scale=0.1 + 0.2, teacher=True
    )
    words = shlex.split(command(request, source))
    assert words[:2] == ["animatelcm", "generate"]
    again = _parsed(words[2:])
    assert _sized(again.request, again.size).resolved(FACTS) == request
    assert again.source == source


NAMES = st.text("ab/:.\\ '\"$", min_size=1, max_size=8).map(lambda text: "x" + text)


@given(st.lists(NAMES, max_size=3), st.floats(-2, 2), st.booleans(), NAMES)
@settings(max_examples=10, deadline=None)
def test_a_source_says_itself_in_words(style, scale, teacher, model):
    source = ModelSource(model=model, style=tuple(style), image_scale=scale, teacher=teacher)
    assert _parsed(["a parrot", *source.words()]).source == source


def test_defaults_need_no_words():
    assert ModelSource().words() == ["--model", "emoji"]
    assert _parsed(["a parrot"]).source == ModelSource()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name", ("name", 1.0)),
        ("a/b:0.8", ("a/b", 0.8)),
        ("a/b.safetensors:-1", ("a/b.safetensors", -1.0)),
        ("C:\\x\\y.safetensors", ("C:\\x\\y.safetensors", 1.0)),
        ("C:/x/y.safetensors", ("C:/x/y.safetensors", 1.0)),
        ("C:\\x\\y.safetensors:0.5", ("C:\\x\\y.safetensors", 0.5)),
    ],
)
def test_a_style_has_a_scale_behind_its_last_colon(text, expected):
    assert ModelSource(style=(text,)).styles() == [expected]


@pytest.mark.parametrize("text", ["soft:", "soft:much", "a/b:0,8"])
def test_a_scale_that_is_no_number_is_a_sentence(text):
    with pytest.raises(ValueError, match=rf"style '{text}': '.*' is no scale; write FILE or FILE:0\.8"):
        ModelSource(style=("fine:1", text)).styles()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("edge=a/b.mp4", ("edge", "a/b.mp4", False, 1.0, 0.0, 1.0)),
        ("edge=b.mp4:0.8", ("edge", "b.mp4", False, 0.8, 0.0, 1.0)),
        ("edge=b.mp4:0", ("edge", "b.mp4", False, 0.0, 0.0, 1.0)),
        ("pose=map:b.mp4:.5@0.25-0.75", ("pose", "b.mp4", True, 0.5, 0.25, 0.75)),
        ("canny=b:1@0-.5", ("canny", "b", False, 1.0, 0.0, 0.5)),
        ("tile=C:\\x\\y.mp4:2", ("tile", "C:\\x\\y.mp4", False, 2.0, 0.0, 1.0)),
        ("depth=map:C:\\x.mp4", ("depth", "C:\\x.mp4", True, 1.0, 0.0, 1.0)),
        ("edge=a=b.mp4", ("edge", "a=b.mp4", False, 1.0, 0.0, 1.0)),
        ("edge=at 10:30.mp4", ("edge", "at 10:30.mp4", False, 1.0, 0.0, 1.0)),
    ],
)
def test_a_control_has_a_kind_a_file_and_perhaps_a_scale_and_a_part(text, expected):
    assert ControlSource.parse(text) == expected
    assert SampleRequest(prompt="a", control=(text,)).controls() == [expected]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense", "is not KIND=FILE"),
        ("", "is not KIND=FILE"),
        ("edge=", "is not KIND=FILE"),
        ("edge=map:", "is not KIND=FILE"),
        ("=b.mp4", "is not KIND=FILE"),
        ("my edge=b.mp4", "is not KIND=FILE"),
        ("edge=b.mp4:11", "a scale of 0..10"),
        ("edge=b.mp4:1@0.5-0.5", "within 0-1"),
        ("edge=b.mp4:1@0.8-0.2", "within 0-1"),
        ("edge=b.mp4:1@0-2", "within 0-1"),
    ],
)
def test_a_control_that_is_none_is_a_sentence(text, named):
    with pytest.raises(ValueError, match=named) as caught:
        SampleRequest(prompt="a", control=(text,))
    assert repr(text) in str(caught.value)


def test_adapters_have_names_and_places():
    source = ModelSource(adapter=("edge=a/b", "i2v=C:\\x=y.ckpt"))
    assert source.adapters() == {"edge": "a/b", "i2v": "C:\\x=y.ckpt"}
    for text in ("a/b", "edge=", "=a/b", "my edge=a/b"):
        with pytest.raises(ValueError, match="is not NAME=PLACE"):
            ModelSource(adapter=(text,)).adapters()


def test_a_request_names_the_adapters_that_it_needs():
    assert SampleRequest(prompt="a", video="x.mp4").adapter_names() == set()
    assert SampleRequest(prompt="a", image="x.png", control=("edge=x", "pose=y")).adapter_names() == {
        "i2v",
        "edge",
        "pose",
    }


@given(st.lists(NAMES.map(lambda text: f"edge={text}"), max_size=3), NAMES, NAMES, st.floats(0, 1), st.floats(0, 4))
@settings(max_examples=10, deadline=None)
def test_what_steers_a_video_is_said_again(control, image, video, share, motion):
    from animatelcm.verbs import _sized

    steers = {"control": tuple(control), "image": image, "video": video, "motion_scale": motion, "fit": "pad"}
    request = SampleRequest(prompt="a", **steers, colour_match=share, strength=share, sampler="dpm++").resolved(FACTS)
    source = ModelSource(adapter=("edge=a b", "i2v=it's"))
    again = _parsed(shlex.split(command(request, source))[2:])
    assert _sized(again.request, again.size).resolved(FACTS) == request
    assert again.source == source


def test_what_does_not_steer_needs_no_words():
    words = shlex.split(command(SampleRequest(prompt="a").resolved(FACTS), ModelSource()))
    assert not {"--image", "--fit", "--video", "--strength", "--control", "--motion-scale"} & set(words)


def test_a_picture_is_fitted_as_requests_say():
    assert get_args(request.Fit) == get_args(images.Fit)


@pytest.mark.parametrize("count", [1, 2, 10_000])
def test_the_last_seed_is_one_that_is_known(count):
    last = SampleRequest(prompt="a", seed=2**63 - count, num_videos_per_prompt=count).singles()[-1]
    assert last.seed == 2**63 - 1
    with pytest.raises(ValueError, match=rf"seed={2**63 - count + 1} is out of range.*0\.\.2\*\*63 - {count},"):
        SampleRequest(prompt="a", seed=2**63 - count + 1, num_videos_per_prompt=count)


def test_a_seed_of_minus_one_is_drawn_once():
    asked = SampleRequest(prompt="a", seed=-1, num_videos_per_prompt=3)
    drawn = [asked.resolved(FACTS) for _ in range(20)]
    assert len({full.seed for full in drawn}) > 15
    assert all(0 <= full.seed < 2**32 for full in drawn)
    assert all(full.resolved(FACTS) == full for full in drawn)
    words = shlex.split(command(drawn[0], ModelSource()))
    assert words[words.index("--seed") + 1] == str(drawn[0].seed)


@pytest.mark.parametrize(
    ("field", "value", "needs"),
    [
        ("negative_prompt", "a cat", {"guidance_scale": 2.0}),
        ("motion_scale", 0.5, {"image": "a.png"}),
        ("fit", "pad", {"image": "a.png"}),
        ("fit", "pad", {"video": "a.mp4"}),
        ("fit", "pad", {"control": ("edge=a.mp4",)}),
        ("colour_match", 0.5, {"image": "a.png"}),
        ("strength", 0.3, {"video": "a.mp4"}),
        ("spacing", "trailing", {"sampler": "dpm++"}),
    ],
)
def test_a_setting_that_changes_nothing_is_said_and_one_that_does_is_not(field, value, needs):
    plain = {"prompt": "a", "guidance_scale": 1.0, "sampler": "lcm"}
    assert unused(SampleRequest(**plain).resolved(FACTS)) == []
    (said,) = unused(SampleRequest(**plain, **{field: value}).resolved(FACTS))
    assert said.startswith(f"{field} changes nothing")
    assert unused(SampleRequest(**{**plain, **needs, field: value}).resolved(FACTS)) == []


def test_pixels_of_no_file_count_as_a_picture_and_as_a_video():
    asked = SampleRequest(prompt="a", motion_scale=0.5, strength=0.3).resolved(FACTS)
    assert len(unused(asked)) == 2
    assert [said.split()[0] for said in unused(asked, image=True)] == ["strength"]
    assert unused(asked, image=True, video=True) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 25])
@pytest.mark.parametrize("part", ["0-0.2", "0-0.5", "0.3-0.6", "0.5-1", "0.9-1", "0.34-0.66", "0-1", "0.2-0.9"])
def test_a_control_that_acts_in_no_step_is_told_a_part_that_does(steps, part):
    def said(part: str) -> list[str]:
        asked = SampleRequest(prompt="a", control=(f"edge=a.mp4:1@{part}",), num_inference_steps=steps)
        return unused(asked.resolved(FACTS))

    start, end = map(float, part.split("-"))
    acts = any(i / steps >= start and (i + 1) / steps <= end for i in range(steps))  # diffusers' controlnet_keep
    assert bool(said(part)) != acts
    if not acts:
        (sentence,) = said(part)
        assert sentence.startswith(f"control edge changes nothing: none of the {steps} steps")
        assert said(sentence.split()[-1]) == []


def test_steps_before_the_noise_of_a_video_do_not_count():
    asked = {"prompt": "a", "control": ("edge=a.mp4:1@0-0.3",), "num_inference_steps": 8, "strength": 0.25}
    for sampler, idle in (("ddim", 1), ("dpm++", 1), ("lcm", 0)):  # two steps are walked, or eight
        assert len(unused(SampleRequest(**asked, sampler=sampler, video="a.mp4").resolved(FACTS))) == idle


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "image", "video"])
@pytest.mark.parametrize("text", ["-fox", "--steps", "-1", "- a fox", "--"])
def test_a_command_says_what_begins_as_flags_do(name, text):
    from animatelcm.verbs import _sized

    if name in ("image", "video"):
        text = f"{text}.webp"
    request = SampleRequest(**{"prompt": "a", name: text}).resolved(FACTS)
    again = _parsed(shlex.split(command(request, ModelSource(), "fp16"))[2:])
    assert _sized(again.request, again.size).resolved(FACTS) == request
    assert again.precision == "fp16"


def test_a_recipe_says_the_numbers_that_were_computed_with_where_they_are_known():
    request = SampleRequest(prompt="a").resolved(FACTS)
    assert recipe(request, ModelSource(), "1", "bf16")["precision"] == "bf16"
    assert "precision" not in recipe(request, ModelSource(), "1")
    assert "--precision" not in recipe(request, ModelSource(), "1")["command"]


@given(st.integers(1, 9999), st.integers(1, 9999))
@settings(deadline=None)
def test_a_size_is_width_and_height(width, height):
    assert parse_size(f"{width}x{height}") == parse_size(f"{width}X{height}") == (width, height)


@pytest.mark.parametrize("text", ["", "64", "x64", "64x", "64x64x64", "-1x2", "6.5x8", "64 64"])
def test_a_size_that_is_none_is_a_sentence(text):
    with pytest.raises(ValueError, match="is not WIDTHxHEIGHT"):
        parse_size(text)
