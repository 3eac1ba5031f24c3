"""Adapters of the miniature: pictures set in motion, edges, depth and keypoints; none of them asks a teacher."""

from __future__ import annotations

from dataclasses import replace

from animatelcm.config import LCM_TARGETS, AdapterConfig, ConsistencyConfig, DataConfig, LoraConfig, TrainConfig

T2I_TARGETS = ("conv_in", "in_conv", "block1", "block2")
"""Every convolution of a T2I-Adapter."""


def i2v_images_emoji() -> TrainConfig:
    """An encoder of a picture for the miniature, from scratch: first that a still picture is drawn again.

    What the picture says leaves nothing open, so one step leads all the way back (k = T); a batch holds many pictures.
    """
    config = i2v_emoji()
    return replace(
        config,
        name="i2v_images_emoji",
        model="emoji",
        data=DataConfig(kind="emoji-images", length=12_000),
        adapter=AdapterConfig(name="i2v", kind="image"),
        consistency=replace(config.consistency, k=1000, first_frame=1.0),
        steps=1_200,
        batch_size=32,
        learning_rate=1e-3,
    )


def i2v_emoji() -> TrainConfig:
    """Image-to-video on the miniature: AnimateLCM's encoder of a picture, taught to move without a teacher.

    Few long steps back keep it to what the clips show; many short ones to what the network would draw by itself. The
    first frame counts for as much as all others: it is the one that is given.
    """
    return TrainConfig(
        name="i2v_emoji",
        objective="consistency",
        trainable="adapter",
        model="runs/out/i2v_images_emoji/model",
        data=DataConfig(kind="emoji-clips", length=6_000),
        adapter=AdapterConfig(name="i2v", kind="image", start="model"),
        consistency=ConsistencyConfig(earlier="noise", k=250, huber_c=0.3, first_frame=16.0),
        steps=220,
        batch_size=4,
        learning_rate=4e-4,
        lr_schedule="onecycle",
        weight_decay=0.0,
        ema_decay=0.99,
        text_dropout=0.0,
        warmup_steps=50,
    )


def t2i_adapter_emoji() -> TrainConfig:
    """A T2I-Adapter of the miniature that reads soft edges, on images, beside the many-step model."""
    return TrainConfig(
        name="t2i_adapter_emoji",
        objective="diffusion",
        trainable="adapter",
        model="emoji",
        data=DataConfig(kind="emoji-images", length=12_000),
        adapter=AdapterConfig(name="edge", kind="t2i_adapter"),
        steps=600,
        batch_size=32,
        learning_rate=1e-3,
        lr_schedule="onecycle",
        timestep_shift=2.0,
        max_loss_weight=100.0,
        weight_decay=0.0,
        ema_decay=0.99,
        warmup_steps=50,
    )


def t2i_adapter_depth_emoji() -> TrainConfig:
    """The same for the renderer's depth: how near each pixel's thing is."""
    config = t2i_adapter_emoji()
    adapter = AdapterConfig(name="depth", kind="t2i_adapter")
    return replace(config, name="t2i_adapter_depth_emoji", adapter=adapter)


def controlnet_emoji() -> TrainConfig:
    """A ControlNet of the miniature that reads keypoints, on images, beside the many-step model."""
    config = t2i_adapter_emoji()
    adapter = AdapterConfig(name="pose", kind="controlnet")
    return replace(config, name="controlnet_emoji", adapter=adapter, steps=900, learning_rate=5e-4)


def t2i_adapter_lora_emoji() -> TrainConfig:
    """The T2I-Adapter made fit for few-step videos: LoRA layers on it, learned on clips without a teacher.

    The image model guides the clips' own noise: by that noise alone (``earlier="noise"``, the paper's eq. 12) the first
    bundle lost 8 to 18 points of subjects, the one that ships none that 64 clips tell (docs/results.md).
    """
    return replace(
        i2v_emoji(),
        name="t2i_adapter_lora_emoji",
        model="runs/out/t2i_adapter_emoji/model",
        adapter=t2i_adapter_emoji().adapter,
        lora=LoraConfig(name="edge", rank=16, alpha=16.0, targets=T2I_TARGETS),
        consistency=ConsistencyConfig(earlier="guided-noise", w_min=1.0, w_max=3.0, k=100, huber_c=0.3),
        steps=200,
        learning_rate=5e-4,
    )


def controlnet_lora_emoji() -> TrainConfig:
    """The ControlNet made fit for few steps, without a teacher too: it hears whether the frames that come of noise show
    things where it was told. Images do: places are learned from them, and many fit into a batch.
    """
    config = t2i_adapter_lora_emoji()
    return replace(
        config,
        name="controlnet_lora_emoji",
        model="runs/out/controlnet_emoji/model",
        data=DataConfig(kind="emoji-images", length=12_000),
        adapter=controlnet_emoji().adapter,
        lora=LoraConfig(name="pose", rank=16, alpha=16.0, targets=LCM_TARGETS[:10]),
        consistency=replace(config.consistency, feedback=2.0),
        steps=300,
        batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
    )
