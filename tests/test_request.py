from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animatelcm.model import Facts
from animatelcm.request import ModelSource, SampleRequest, command

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


def _parsed(words):
    import tyro

    from animatelcm.cli import Generate

    return tyro.cli(Generate, args=words)


def test_the_command_says_the_request_again():
    from animatelcm.cli import _sized

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
