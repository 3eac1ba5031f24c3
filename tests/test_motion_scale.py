"""How strong the frames' positions were in an image encoder's training: kept with it, and the default of its videos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from animatelcm import batch, recipes, stages
from animatelcm.assembly import load_sum
from animatelcm.bundle import ADAPTERS
from animatelcm.condition import Condition
from animatelcm.evaluate.emoji import fingerprint
from animatelcm.model_source import ModelSource
from animatelcm.nets.image_encoder import ImageEncoderConfig
from animatelcm.provenance import command
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample
from animatelcm.saving import save
from test_condition import beside, clip

ASKED = SampleRequest(prompt="a fox", image="a.png", num_frames=3, num_inference_steps=1, guidance_scale=1.0)


@pytest.fixture(scope="module")
def bundle(fresh_model, tmp_path_factory):
    """A model whose image encoder was trained at 0.3."""
    model = beside(fresh_model, "i2v")
    network = model.adapters["i2v"]
    network.config = replace(network.config, motion_scale=0.3)
    folder = tmp_path_factory.mktemp("scale") / "model"
    save(model, folder, dtype=torch.float32)
    return folder


def drawn(source: ModelSource, scale: float | None) -> np.ndarray:
    seen = Condition(image=clip(1, 64, 64)[0])
    (made,) = sample(load_sum(source), replace(ASKED, motion_scale=scale), condition=seen)
    return made.frames


def test_a_bundle_draws_as_its_encoder_was_trained_unless_it_is_told_otherwise(bundle):
    source = ModelSource(model=str(bundle))
    assert np.array_equal(drawn(source, None), drawn(source, 0.3))
    assert not np.array_equal(drawn(source, None), drawn(source, 0.8))


def test_the_scale_goes_with_the_adapters_folder_into_another_model(bundle):
    source = ModelSource(adapter=(f"i2v={bundle / ADAPTERS / 'i2v'}",))
    assert np.array_equal(drawn(source, None), drawn(source, 0.3))
    assert not np.array_equal(drawn(source, None), drawn(source, 0.8))


def test_a_run_leaves_the_scale_that_it_trains_with(bundle):
    config = replace(recipes.i2v_emoji(), model=str(bundle))
    for start, scale in (("fresh", 0.5), ("model", 0.7)):
        changed = replace(config, adapter=replace(config.adapter, start=start, motion_scale=scale))
        left = stages.result(changed, stages.starting_model(changed))
        assert left.adapters["i2v"].config.motion_scale == scale


def test_models_that_differ_in_it_alone_are_other_models(bundle):
    one, two = (load_sum(ModelSource(model=str(bundle))) for _ in range(2))
    assert batch.about(one) == batch.about(two)
    assert fingerprint(one, "i2v") == fingerprint(two, "i2v")
    network = two.adapters["i2v"]
    network.config = replace(network.config, motion_scale=0.4)
    assert batch.about(one) != batch.about(two)
    assert fingerprint(one, "i2v") != fingerprint(two, "i2v")
    assert fingerprint(one) == fingerprint(two)


def test_encoders_that_do_not_say_are_those_of_animatelcm():
    assert ImageEncoderConfig.from_json({"_class_name": "ImageEncoder"}).motion_scale == 0.8
    for scale in (-0.1, 5, "0.8", True, float("nan")):
        with pytest.raises(ValueError, match="is no number of 0 to 4"):
            ImageEncoderConfig.from_json({"motion_scale": scale})


def test_the_command_says_what_was_asked_and_no_more():
    full = ASKED.resolved(load_sum(ModelSource()).facts)
    assert "--motion-scale" not in command(full, ModelSource())
    assert "--motion-scale 0.5" in command(replace(full, motion_scale=0.5), ModelSource())
