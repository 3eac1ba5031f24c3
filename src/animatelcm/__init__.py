"""AnimateLCM: few-step personalised video models, trained and run.

``animatelcm.load("emoji")`` -> ``VideoModel``;
``animatelcm.sample(model, SampleRequest(prompt="a parrot"))`` -> ``[Video]``.
Names are imported when first used: ``import animatelcm`` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from animatelcm.bundle import load as load
    from animatelcm.condition import Condition as Condition
    from animatelcm.condition import Control as Control
    from animatelcm.config import TrainConfig as TrainConfig
    from animatelcm.fusion import fuse as fuse
    from animatelcm.fusion import unfuse as unfuse
    from animatelcm.model import VideoModel as VideoModel
    from animatelcm.pipeline import Pipeline as Pipeline
    from animatelcm.provenance import Video as Video
    from animatelcm.request import SampleRequest as SampleRequest
    from animatelcm.sampling import sample as sample
    from animatelcm.sampling import sample_steps as sample_steps
    from animatelcm.schedule import NoiseSchedule as NoiseSchedule
    from animatelcm.training import train as train

__version__ = "0.1.0"

_HOMES = {
    "Condition": "condition",
    "Control": "condition",
    "NoiseSchedule": "schedule",
    "Pipeline": "pipeline",
    "SampleRequest": "request",
    "TrainConfig": "config",
    "Video": "provenance",
    "VideoModel": "model",
    "fuse": "fusion",
    "load": "bundle",
    "sample": "sampling",
    "sample_steps": "sampling",
    "train": "training",
    "unfuse": "fusion",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'animatelcm' has no attribute {name!r}")
    return getattr(import_module(f"animatelcm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
