from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch._dynamo.testing import CompileCounter

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import FIXED, UNetConfig, VideoUNet
from networks import TWO

SD15 = UNetConfig(
    sample_size=16,
    block_out_channels=(16, 32, 32, 32),
    cross_attention_dim=12,
    attention_head_dim=4,
    norm_num_groups=8,
)
"""Stable Diffusion 1.5 made narrow."""

MOTION = MotionConfig(num_attention_heads=4, norm_num_groups=8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(frames: int, size: tuple[int, int] = (8, 8), batch: int = 2) -> tuple[torch.Tensor, ...]:
    return noise(batch, 4, frames, *size), torch.tensor([3, 987, 500][:batch]), noise(batch, 7, 12, seed=1)


def acting(config: UNetConfig, motion: MotionConfig | None = MOTION) -> VideoUNet:
    """A network whose every weight is random, the last maps of motion modules too."""
    torch.manual_seed(0)
    unet = VideoUNet(config, motion).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "motion_modules" in name and "transformer_blocks" not in name and "proj_out" in name:
                parameter.normal_(std=0.2)
    return unet


def image_twin(unet: VideoUNet) -> UNet2DConditionModel:
    """diffusers' image UNet with the same weights, names and all."""
    theirs = UNet2DConditionModel.from_config(unet.config.to_diffusers()).eval()
    theirs.load_state_dict({key: value for key, value in unet.state_dict().items() if "motion_modules" not in key})
    return theirs


def video_twin(unet: VideoUNet) -> UNetMotionModel:
    """diffusers' video UNet with the same weights."""
    spatial = unet.config.to_diffusers()
    for key in ("_class_name", "flip_sin_to_cos", "freq_shift"):
        spatial.pop(key)
    heads = spatial.pop("attention_head_dim")
    for key in ("down_block_types", "up_block_types"):
        spatial[key] = tuple(kind.replace("2D", "Motion") for kind in spatial[key])
    theirs = UNetMotionModel(
        **spatial,
        num_attention_heads=heads,
        motion_num_attention_heads=unet.motion.num_attention_heads,
        motion_max_seq_length=unet.motion.max_frames,
        use_motion_mid_block=unet.motion.use_mid_block,
    )
    theirs.load_state_dict({**unet.state_dict(), **unet.positions()})
    return theirs.eval()


def frame_by_frame(theirs: UNet2DConditionModel, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return torch.stack([theirs(frame, t, text).sample for frame in x.unbind(2)], dim=2)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


VARIANTS = {
    "sd15": {},
    "linear": {"use_linear_projection": True, "attention_head_dim": (2, 4, 8, 8)},
    "deep": {"transformer_layers_per_block": (1, 2, 1, 3), "layers_per_block": 1},
    "time": {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-3},
    "plain": {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_one_frame_is_diffusers_image_network(variant) -> None:
    unet = acting(UNetConfig(**{**vars(SD15), **VARIANTS[variant]}), motion=None)
    theirs = image_twin(unet)
    for size in ((8, 8), (10, 14)):
        x, t, text = inputs(1, size)
        close(unet(x, t, text)[:, :, 0], theirs(x[:, :, 0], t, text).sample)
    close(unet(x, t[0], text)[:, :, 0], theirs(x[:, :, 0], t[0], text).sample)


@torch.no_grad()
def test_guidance_embedding_is_diffusers_and_starts_silent() -> None:
    unet = acting(UNetConfig(**{**vars(TWO), "time_cond_proj_dim": 6}), motion=None)
    x, t, text = inputs(1)
    condition = noise(2, 6, seed=2)
    assert torch.equal(unet(x, t, text, timestep_cond=condition), unet(x, t, text))
    unet.time_embedding.cond_proj.weight.normal_()
    theirs = image_twin(unet)
    close(
        unet(x, t, text, timestep_cond=condition)[:, :, 0],
        theirs(x[:, :, 0], t, text, timestep_cond=condition).sample,
    )


@pytest.mark.parametrize(("size", "mid"), [((8, 8), True), ((10, 14), False)])
@torch.no_grad()
def test_joint_norm_is_diffusers_video_network(size, mid) -> None:
    unet = acting(SD15, MotionConfig(num_attention_heads=4, norm_num_groups=8, norm="joint", use_mid_block=mid))
    theirs = video_twin(unet)
    x, t, text = inputs(5, size)
    expected = theirs(x, t, text.repeat_interleave(5, 0)).sample
    close(unet(x, t, text), expected)
    assert (unet(x, t, text, motion=False) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_control_residuals_are_diffusers() -> None:
    unet = acting(SD15, None)
    theirs = image_twin(unet)
    x, t, text = inputs(2)
    sizes = [(16, 8)] * 3 + [(16, 4)] + [(32, 4)] * 2 + [(32, 2)] * 3 + [(32, 1)] * 3
    skips = [noise(2, channels, 2, side, side, seed=i) for i, (channels, side) in enumerate(sizes)]
    mid = noise(2, 32, 2, 1, 1, seed=20)
    expected = [
        theirs(
            x[:, :, f],
            t,
            text,
            down_block_additional_residuals=tuple(skip[:, :, f] for skip in skips),
            mid_block_additional_residual=mid[:, :, f],
        ).sample
        for f in range(2)
    ]
    close(unet(x, t, text, skip_residuals=skips, mid_residual=mid), torch.stack(expected, dim=2))


@torch.no_grad()
def test_features_are_diffusers_t2i_adapter_features() -> None:
    unet = acting(SD15, None)
    theirs = image_twin(unet)
    x, t, text = inputs(2)
    features = [
        noise(2, channels, 2, side, side, seed=i)
        for i, (channels, side) in enumerate([(16, 8), (32, 4), (32, 2), (32, 1)])
    ]
    expected = [
        theirs(
            x[:, :, f],
            t,
            text,
            down_intrablock_additional_residuals=[feature[:, :, f] for feature in features],
        ).sample
        for f in range(2)
    ]
    close(unet(x, t, text, features=features), torch.stack(expected, dim=2))


@torch.no_grad()
def test_fresh_or_switched_off_motion_is_the_image_network_frame_by_frame() -> None:
    x, t, text = inputs(3)
    fresh = VideoUNet(TWO, MOTION).eval()
    expected = frame_by_frame(image_twin(fresh), x, t, text)
    close(fresh(x, t, text), expected)
    trained = acting(TWO)
    expected = frame_by_frame(image_twin(trained), x, t, text)
    close(trained(x, t, text, motion=False), expected)
    assert (trained(x, t, text) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_videos_of_a_batch_do_not_see_each_other() -> None:
    unet, (x, t, text) = acting(TWO), inputs(4, batch=3)
    apart = [unet(x[i : i + 1], t[i], text[i : i + 1]) for i in range(3)]
    close(unet(x, t, text), torch.cat(apart))


@torch.no_grad()
def test_text_of_a_video_is_the_text_of_its_frames() -> None:
    unet, (x, t, text) = acting(TWO), inputs(3)
    close(unet(x, t, text), unet(x, t, text.repeat_interleave(3, 0)))
    texts = noise(6, 7, 12, seed=5)
    frames = x.transpose(1, 2).reshape(6, 4, 1, 8, 8)
    expected = unet(frames, t.repeat_interleave(3), texts, motion=False)
    close(unet(x, t, texts, motion=False), expected.reshape(2, 3, 4, 8, 8).transpose(1, 2))


def test_wrong_counts_are_errors_that_say_the_right_ones() -> None:
    unet, (x, t, text) = VideoUNet(TWO, MOTION), inputs(2)
    long = noise(1, 4, 65, 4, 4)
    with pytest.raises(ValueError, match=r"frames=65.*1\.\.64"):
        unet(long, t[:1], text[:1])
    assert unet(long, t[:1], text[:1], motion=False).shape == long.shape
    assert unet(long[:, :, :64], t[:1], text[:1]).shape == (1, 4, 64, 4, 4)
    with pytest.raises(ValueError, match="features: 1 given; give 2"):
        unet(x, t, text, features=[x])
    with pytest.raises(ValueError, match="skip_residuals: 3 given; give 4"):
        unet(x, t, text, skip_residuals=[x] * 3)
    with pytest.raises(ValueError, match="text: 3 given for 2 videos of 2 frames"):
        unet(x, t, noise(3, 7, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_latents_keep_their_dtype_at_the_border(dtype) -> None:
    unet, (x, t, text) = acting(TWO), inputs(2)
    extras = {"features": [noise(2, 16, 2, 8, 8, seed=7), noise(2, 32, 2, 4, 4, seed=8)]}
    expected = unet(x, t, text, **extras)
    found = unet.to(dtype)(x, t, text, **extras)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert unet.float()(x, t, text, **extras).dtype == torch.float32


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    unet, (x, t, text) = acting(TWO), inputs(3)
    skips = [noise(2, 16, 3, 8, 8)] * 2 + [noise(2, 16, 3, 4, 4), noise(2, 32, 3, 4, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    close(compiled(x, t, text, skip_residuals=skips), unet(x, t, text, skip_residuals=skips))


@torch.no_grad()
def test_all_timesteps_are_one_graph_with_what_is_remembered_of_them() -> None:
    """As ``compile="full"`` samples."""
    unet, (x, _, text) = acting(TWO), inputs(3)
    times = torch.tensor([999, 499, 3])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    for t, remembered in zip(times, unet.remember(times, text[:1]), strict=True):
        given = x[:1], t[None], text[:1]
        close(compiled(*given, remembered=remembered), unet(*given))
    assert counter.frame_count == 1


def test_trains_as_one_graph_with_checkpointing() -> None:
    one_level = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet, (x, t, text) = acting(UNetConfig(**{**vars(TWO), **one_level})), inputs(3)
    unet.enable_gradient_checkpointing()
    torch._dynamo.reset()
    gradients = []
    for network in (unet, torch.compile(unet, fullgraph=True, backend="eager")):
        unet.zero_grad(set_to_none=True)
        network(x, t, text).square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_needs_no_data_to_run() -> None:
    """On the meta device there are no values to look at; and Stable Diffusion 1.5 has its published size."""
    sd15 = UNetConfig(cross_attention_dim=768)
    with torch.device("meta"):
        unet = VideoUNet(sd15, MotionConfig())
        shape = (1, 4, 16, 64, 64)
        y = unet(torch.empty(shape), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, 768))
    assert y.shape == shape
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    motion = {name: size for name, size in sizes.items() if "motion_modules" in name}
    assert sum(sizes.values()) - sum(motion.values()) == 859_520_964
    assert len(motion) == 21 * 26
    assert sum(motion.values()) == 5 * 2_259_520 + 5 * 9_024_640 + 11 * 36_071_680


def test_channels_stay_last_everywhere() -> None:
    unet, (x, t, text) = acting(TWO), inputs(3)
    strided: list[str] = []

    def look(name: str):
        def hook(module, _, y) -> None:
            images = [y] if isinstance(y, torch.Tensor) else y
            if any(image.dim() == 4 and not image.is_contiguous(memory_format=torch.channels_last) for image in images):
                strided.append(name)

        return hook

    watched = [name for name, module in unet.named_modules() if name and not isinstance(module, torch.nn.ModuleList)]
    for name in watched:
        # Inside a temporal block four dimensions are (B, F, P, C), not an image.
        if ".transformer_blocks." not in name and not name.endswith(
            (
                "motion_modules.0.proj_in",
                "motion_modules.0.proj_out",
                "motion_modules.1.proj_in",
                "motion_modules.1.proj_out",
            )
        ):
            unet.get_submodule(name).register_forward_hook(look(name))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            unet(x, t, text)
    assert strided == []
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in unet.parameters()
        if parameter.dim() == 4
    )


@contextmanager
def saved_bytes(unet: VideoUNet) -> Iterator[list[int]]:
    """What autograd keeps for the backward pass, each memory once, parameters excluded."""
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, torch.Tensor] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


@pytest.mark.parametrize("config", [SD15, TWO], ids=["sd15", "two"])
def test_checkpointing_keeps_a_fifth_of_the_memory_and_every_gradient(config) -> None:
    unet, (x, t, text) = acting(config), inputs(4, (16, 16))
    memory, gradients = {}, {}
    for checkpointing in (False, True):
        unet.zero_grad(set_to_none=True)
        unet.enable_gradient_checkpointing(checkpointing)
        with saved_bytes(unet) as total:
            y = unet(x, t, text)
        y.square().mean().backward()
        memory[checkpointing] = total[0]
        gradients[checkpointing] = [parameter.grad for parameter in unet.parameters()]
    assert memory[True] <= 0.2 * memory[False], f"{memory[True] / memory[False]:.1%}"
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_temporal_layers_train_alone_with_the_gradients_of_all() -> None:
    unet, (x, t, text) = acting(TWO), inputs(3)
    motion = {name: parameter for name, parameter in unet.named_parameters() if "motion_modules" in name}
    unet(x, t, text).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in motion.items()}
    unet.zero_grad(set_to_none=True)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in motion)
    unet(x, t, text).square().mean().backward()
    for name, parameter in motion.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_config_covers_every_setting_of_diffusers_with_its_defaults() -> None:
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
        if name != "self"
    }
    ours = {key: value for key, value in UNetConfig().to_diffusers().items() if key != "_class_name"}
    assert {**ours, **FIXED} == theirs
    assert not ours.keys() & FIXED.keys()


@pytest.mark.parametrize("config", [SD15, TWO, UNetConfig(attention_head_dim=(5, 10, 20, 20))])
def test_config_survives_its_file(config) -> None:
    assert UNetConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
    assert UNetConfig.from_diffusers(dict(UNet2DConditionModel.from_config(TWO.to_diffusers()).config)) == TWO


@pytest.mark.parametrize("key", FIXED)
def test_settings_without_support_are_named(key) -> None:
    with pytest.raises(ValueError, match=rf"{key}='other'"):
        UNetConfig.from_diffusers({key: "other"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mid_block_types": "x"}, "unknown setting mid_block_types"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "'AttnDownBlock2D' is not supported"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types"),
        ({"layers_per_block": [2, 2, 2, 2]}, "layers_per_block"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "transformer_layers_per_block"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"norm_num_groups": 48}, "norm_num_groups=48"),
        ({"attention_head_dim": 7}, "320 channels do not split into 7"),
    ],
)
def test_impossible_settings_are_explained(settings, message) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        VideoUNet(UNetConfig.from_diffusers(settings))
