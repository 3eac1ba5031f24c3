from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from animatelcm import recipes
from animatelcm.config import ConsistencyConfig, DataConfig, TrainConfig

RECIPES = [recipes.vae_emoji, recipes.base_emoji, recipes.teacher_emoji]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_config_survives_its_file(recipe):
    assert TrainConfig.from_json(recipe().to_json()) == recipe()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_named_as_its_function(recipe):
    assert recipe().name == recipe.__name__


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stpes": 5}, "stpes"),
        ({"steps": "many"}, "steps"),
        ({"lr_schedule": "wavy"}, "wavy"),
        ({"data": {"kind": "emoji-images", "lenght": 3}}, "lenght"),
        ({"steps": 0}, "steps"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"sample_every": 0}, "sample_every=0"),
        ({"text_dropout": 1.5}, "text_dropout"),
    ],
)
def test_a_wrong_field_is_named(change, named):
    values = json.loads(recipes.base_emoji().to_json()) | change
    with pytest.raises(ValueError, match=named):
        TrainConfig.from_json(json.dumps(values))


def test_a_missing_field_is_an_error():
    with pytest.raises(ValueError, match="objective"):
        TrainConfig.from_json('{"name": "x", "trainable": "motion"}')


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="motion"):
        replace(recipes.teacher_emoji(), data=DataConfig(kind="emoji-images"))
    with pytest.raises(ValueError, match="folder"):
        DataConfig(kind="folder")
    with pytest.raises(ValueError, match='objective="autoencoder" is for "autoencoder" or "decoder"'):
        replace(recipes.vae_decoder_emoji(), trainable="image")
    with pytest.raises(ValueError, match="objective='diffusion' cannot train 'decoder'"):
        replace(recipes.base_emoji(), trainable="decoder")
    with pytest.raises(ValueError, match="first_frame=0"):
        ConsistencyConfig(first_frame=0.0)
    with pytest.raises(ValueError, match=r"gamma=-0\.5 must be"):
        ConsistencyConfig(gamma=-0.5)
    with pytest.raises(ValueError, match=r"data\.num_frames=1: "):
        replace(recipes.teacher_emoji(), data=DataConfig(kind="folder", path=Path("clips"), num_frames=1))


@pytest.mark.parametrize("name", ["a/b", "../a", "", ".a", "a:1"])
def test_a_lora_has_the_name_of_a_file(name):
    with pytest.raises(ValueError, match=r"lora\.name=.* is to name a file"):
        replace(recipes.image_lcm_emoji().lora, name=name)
