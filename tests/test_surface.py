"""The public surface: names, fields (which are flags too), recipes. Edit ``surface.txt`` on purpose."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import animatelcm
from animatelcm import cli, recipes
from animatelcm.config import AdapterConfig, ConsistencyConfig, DataConfig, LoraConfig, TrainConfig
from animatelcm.evaluating import I3dSource
from animatelcm.model import Facts
from animatelcm.model_source import ModelSource
from animatelcm.provenance import Video
from animatelcm.request import SampleRequest

CONFIGS = (TrainConfig, DataConfig, LoraConfig, ConsistencyConfig, AdapterConfig)
KINDS = (
    SampleRequest,
    ModelSource,
    Video,
    Facts,
    *CONFIGS,
    *cli.VERBS.values(),
    *cli.PROTOCOLS.values(),
    I3dSource,
    cli.RunOptions,
)
RECORD = Path(__file__).with_name("surface.txt")


def _surface() -> list[str]:
    lines = [f"animatelcm.{name}" for name in animatelcm.__all__]
    for kind in KINDS:
        lines += [f"{kind.__name__}.{field.name}" for field in fields(kind)]
    lines += [f"recipe {name}" for name in recipes.__all__]
    return sorted(lines)


def test_the_surface_is_the_recorded_one():
    assert "\n".join(_surface()) == RECORD.read_text().strip()


def test_every_public_name_resolves():
    for name in animatelcm.__all__:
        assert getattr(animatelcm, name) is not None
    assert callable(animatelcm.sample)  # whatever was imported before
    assert callable(animatelcm.train)
