"""``animatelcm train RECIPE``: flags are the fields of a config, and a dry run counts before any weight is there."""

from __future__ import annotations

import pytest

from animatelcm import cli
from animatelcm.config import TrainConfig
from animatelcm.recipes import base_emoji
from test_cli import fails


def test_train_dry_run_prints_the_resolved_plan(capsys):
    cli.main(["train", "base_emoji", "--steps", "7", "--data.length", "9", "--dry-run"])
    config = TrainConfig.from_json(capsys.readouterr().out)
    assert (config.steps, config.data.length) == (7, 9)
    assert config.learning_rate == base_emoji().learning_rate


def test_every_part_of_a_distillation_is_a_flag(capsys):
    flags = "--lora.rank 8 --lora.targets to_q to_v --consistency.init direct --consistency.mu 0.9"
    cli.main(["train", "image_lcm_emoji", *flags.split(), "--dry-run"])
    config = TrainConfig.from_json(capsys.readouterr().out)
    assert (config.lora.rank, config.lora.targets) == (8, ("to_q", "to_v"))
    assert (config.consistency.init, config.consistency.mu) == ("direct", 0.9)


MOTION = 5 * 2_259_520 + 5 * 9_024_640 + 11 * 36_071_680
"""AnimateDiff's 21 temporal modules of 320, 640 and 1280 channels."""
SPATIAL, LCM_LORA = 859_520_964, 67_252_224
STYLE_LORA = 32 * (16 * 2 * 768 + 32 * (5 * 320 + 5 * 640 + 6 * 1280))
"""Rank 32 on 16 transformers: text 2 (C + 768); the rest of their attentions, in and out maps, feed-forward 30 C."""


@pytest.mark.parametrize(
    ("recipe", "trainable", "parameters"),
    [
        ("style_lora_sd15", STYLE_LORA, SPATIAL + STYLE_LORA),
        ("image_lcm_sd15", LCM_LORA, SPATIAL + LCM_LORA),
        ("video_lcm_sd15", MOTION, SPATIAL + LCM_LORA + MOTION),
    ],
)
def test_dry_run_counts_stable_diffusion_before_any_weight_is_there(recipe, trainable, parameters, capsys):
    pytest.importorskip("peft")
    cli.main(["train", recipe, "--dry-run"])
    shown = capsys.readouterr()
    assert TrainConfig.from_json(shown.out).name == recipe
    costs = {name: float(value.replace(",", "")) for name, value in map(str.split, shown.err.splitlines())}
    assert costs["trainable"] == trainable
    assert costs["parameters"] == parameters
    assert costs["flops"] > 1e12
    assert costs["weights_gib"] > (2 * parameters + 18 * trainable) / 2**30  # frozen ones in half
    assert 0 < costs["activations_gib"] < 80


def test_dry_run_of_an_autoencoder_prints_its_recipe(capsys):
    cli.main(["train", "vae_emoji", "--dry-run"])
    assert TrainConfig.from_json(capsys.readouterr().out).name == "vae_emoji"


@pytest.mark.parametrize("words", [[], ["no_such_recipe"], ["--dry-run"], ["DataConfig"]])
def test_train_without_a_recipe_lists_them(words, capsys):
    assert "base_emoji" in fails(["train", *words], capsys)
