"""Community files added up, against diffusers' own pipelines on the same files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import standins
from animatelcm import Pipeline
from animatelcm.assembly import load_sum, with_temporal_layers
from animatelcm.bench import peers
from animatelcm.bundle import ASSETS
from animatelcm.conversion import convert
from animatelcm.model_source import ModelSource
from animatelcm.nets import sd15
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.sampling import sample_steps
from animatelcm.saving import save
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import Tokenizer, read_merges
from animatelcm.weights.files import read_header
from animatelcm.weights.identify import identify
from animatelcm.weights.lora import read_lora, write_lora
from networks import same_state
from test_condition import beside

TEXT = 64
REQUEST = SampleRequest(prompt="a cat on a roof", num_frames=4, width=64, height=64, seed=5)


def _lively(state):
    """Numbers as a fresh network has them, so that every layer acts: 0.02 everywhere would vanish on the way."""
    source = torch.Generator().manual_seed(1)
    lively = {}
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=source)
        if value.ndim == 1 and key.endswith(".weight"):  # of a norm
            value = 1 + 0.1 * noise
        elif value.ndim > 1 and "pe" not in key.split(".")[-1] and "position_ids" not in key:
            value = noise / value[0].numel() ** 0.5
        lively[key] = value
    return lively


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, an AnimateLCM motion module and its acceleration, shrunken, in the published layouts."""
    folder = tmp_path_factory.mktemp("files")
    base = standins.fill(standins.ldm_checkpoint(text=TEXT, layers=2), seed=1)
    save_file(_lively(base), folder / "base.safetensors")
    torch.save(_lively(standins.fill(standins.animatelcm_t2v(), seed=2)), folder / "motion.ckpt")
    save_file(standins.fill(standins.lcm_lora(text=TEXT), seed=3), folder / "fast.safetensors")
    return folder


@pytest.fixture(scope="module")
def theirs(files, tmp_path_factory):
    """diffusers' AnimateDiffPipeline from the same three files."""
    configs = tmp_path_factory.mktemp("configs")
    text = {**sd15.TEXT, "hidden_size": TEXT, "intermediate_size": 4 * TEXT}
    StableDiffusionPipeline(
        vae=AutoencoderKL(**{**sd15.VAE, "block_out_channels": standins.SMALL}),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**text, "num_hidden_layers": 2, "num_attention_heads": 1})),
        tokenizer=peers.tokenizer(Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS)),
        unet=UNet2DConditionModel(block_out_channels=standins.SMALL, cross_attention_dim=TEXT),
        scheduler=LCMScheduler.from_config(
            NoiseSchedule(beta_schedule="linear", solver_steps=100).to_diffusers("LCMScheduler")
        ),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(configs)
    adapter = MotionAdapter(block_out_channels=standins.SMALL, motion_max_seq_length=64)
    adapter.save_pretrained(configs / "motion")
    adapter = MotionAdapter.from_single_file(str(files / "motion.ckpt"), config=str(configs / "motion"))
    base = StableDiffusionPipeline.from_single_file(str(files / "base.safetensors"), config=str(configs))
    pipeline = AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        motion_adapter=adapter,
        scheduler=LCMScheduler.from_pretrained(configs / "scheduler"),
    )
    pipeline.load_lora_weights(str(files / "fast.safetensors"), adapter_name="fast")
    pipeline.set_adapters(["fast"], [0.8])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ours(files, norm: str = "per_frame"):
    pipeline = Pipeline.from_pretrained(
        files / "base.safetensors", motion=files / "motion.ckpt", loras=[(files / "fast.safetensors", 0.8)]
    )
    for module in pipeline.model.unet.modules():
        if hasattr(module, "joint"):
            module.joint = norm == "joint"
    return pipeline


def _frames(pipeline) -> torch.Tensor:
    """(F, 3, H, W) in [0, 1], before they are rounded to whole numbers."""
    *_, last = sample_steps(pipeline.model, REQUEST)
    with torch.inference_mode():
        latents = last.latents[0].transpose(0, 1) / pipeline.model.vae.config.scaling_factor
        return (pipeline.model.vae.decode(latents) / 2 + 0.5).clamp(0, 1)


def _frames_of(theirs, monkeypatch) -> torch.Tensor:
    """The same of diffusers' pipeline, from the same noise at each step."""
    noises = [
        torch.randn((1, 4, 4, 8, 8), generator=generator(REQUEST.seed, step, 0, "latents")) for step in (0, 1, 2, 3)
    ]
    later = iter(noises[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(later))
    return theirs(
        REQUEST.prompt,
        num_frames=4,
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noises[0].clone(),
        output_type="pt",
    ).frames[0]


def test_four_steps_are_diffusers_four_steps(files, theirs, monkeypatch):
    made = _frames_of(theirs, monkeypatch)
    joint, per_frame = _frames(_ours(files, "joint")), _frames(_ours(files))
    assert made.std() > 0.05
    assert (joint - made).abs().max() < 1e-3
    # What diffusers' norm over all frames at once changes, on the same files: not to be overlooked.
    assert (per_frame - made).abs().max() > 0.01


def test_what_is_converted_makes_the_same_frames_in_stock_diffusers(files, tmp_path, monkeypatch):
    """From a folder of motion modules; a file of them holds the same."""
    ours = _ours(files, "joint")
    convert(files / "base.safetensors", tmp_path / "model", to="diffusers", dtype=torch.float32)
    convert(files / "motion.ckpt", tmp_path / "motion", to="diffusers", dtype=torch.float32)
    lora = read_lora(files / "fast.safetensors", ours.model.modules())
    write_lora(lora, tmp_path / "fast.safetensors", metadata={}, dtype=torch.float32, layout="peft")
    adapter = MotionAdapter.from_pretrained(tmp_path / "motion")
    convert(files / "motion.ckpt", tmp_path / "motion.safetensors", to="animatediff", dtype=torch.float32)
    file = MotionAdapter.from_single_file(str(tmp_path / "motion.safetensors"), config=str(tmp_path / "motion"))
    assert same_state(file.state_dict(), adapter.state_dict())
    scheduler = LCMScheduler.from_config(ours.model.schedule.to_diffusers("LCMScheduler"))
    stock = AnimateDiffPipeline.from_pretrained(tmp_path / "model", motion_adapter=adapter, scheduler=scheduler)
    stock.load_lora_weights(str(tmp_path / "fast.safetensors"), adapter_name="fast")
    stock.set_adapters(["fast"], [0.8])
    stock.set_progress_bar_config(disable=True)
    assert (_frames_of(stock, monkeypatch) - _frames(ours)).abs().max() < 1e-3


def test_the_settings_come_with_the_files_and_are_told(files, caplog):
    with caplog.at_level(logging.INFO, logger="animatelcm"):
        model = _ours(files).model
    assert (model.schedule.beta_schedule, model.schedule.solver_steps) == ("linear", 100)
    assert (model.facts.sampler, model.facts.num_inference_steps, model.facts.guidance_scale) == ("lcm", 4, 1.0)
    assert "motion.ckpt is AnimateLCM: linear betas" in caplog.text
    asked = load_sum(
        ModelSource(
            model=str(files / "base.safetensors"),
            motion=str(files / "motion.ckpt"),
            beta_schedule="scaled_linear",
            solver_steps=50,
        )
    )
    assert (asked.schedule.beta_schedule, asked.schedule.solver_steps) == ("scaled_linear", 50)


def test_an_acceleration_alone_makes_a_few_step_model_and_leaves_the_noise(files, tmp_path):
    base = str(files / "base.safetensors")
    model = load_sum(ModelSource(model=base, style=(str(files / "fast.safetensors"),)))
    assert (model.facts.sampler, model.facts.num_inference_steps) == ("lcm", 4)
    assert (model.schedule.beta_schedule, model.schedule.solver_steps) == ("scaled_linear", 50)
    style = standins.fill(standins.lcm_lora(text=TEXT), seed=3)
    style = {key: torch.tensor(32.0) if key.endswith(".alpha") else value for key, value in style.items()}
    save_file(style, tmp_path / "style.safetensors")
    model = load_sum(ModelSource(model=base, style=(str(tmp_path / "style.safetensors"),)))
    assert model.facts.sampler == "ddim"


def test_a_folder_with_a_lora_is_taken_for_it(files, tmp_path):
    base, lora = str(files / "base.safetensors"), tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    lora.parent.mkdir()
    lora.write_bytes((files / "fast.safetensors").read_bytes())
    one, two = (load_sum(ModelSource(model=base, style=(f"{place}:0.5",))) for place in (lora.parent, lora))
    assert same_state(one.unet.state_dict(), two.unet.state_dict())
    lora.rename(lora.with_name("other.safetensors"))
    with pytest.raises(ValueError, match="holds no LoRA"):
        load_sum(ModelSource(model=base, style=(str(lora.parent),)))


def _webui_name(name: str) -> str:
    """A MotionLoRA's, by the words of sd-webui-animatediff 2 (``animatediff_mm.py``, layers by underscored paths)."""
    module, factor = name.removesuffix(".weight").split(".processor.")
    projection, _, side = factor.partition("_lora.")
    projection = "to_out_0" if projection == "to_out" else projection
    return f"{module.replace('.', '_')}_{projection}.lora_{side}.weight"


def test_a_motion_lora_is_added_to_the_temporal_layers(files, tmp_path):
    lora = standins.fill(standins.motion_lora(rank=4), seed=4)
    torch.save(lora, tmp_path / "pan.ckpt")
    base, motion = str(files / "base.safetensors"), str(files / "motion.ckpt")
    plain = load_sum(ModelSource(model=base, motion=motion)).unet.state_dict()
    moved = load_sum(ModelSource(model=base, motion=motion, style=(f"{tmp_path / 'pan.ckpt'}:0.5",))).unet.state_dict()
    key = "down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_q"
    theirs = (
        "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1"
        ".processor.to_q_lora."
    )
    delta = lora[theirs + "up.weight"] @ lora[theirs + "down.weight"]
    assert torch.allclose(moved[f"{key}.weight"], plain[f"{key}.weight"] + 0.5 * delta, atol=1e-6)
    changed = {name for name, value in plain.items() if not torch.equal(value, moved[name])}
    assert len(changed) == 168

    webui = {_webui_name(name): value for name, value in lora.items()}
    save_file(webui, tmp_path / "pan.safetensors")
    assert identify(read_header(tmp_path / "pan.safetensors")).kind == "motion_lora"
    style = (f"{tmp_path / 'pan.safetensors'}:0.5",)
    assert same_state(load_sum(ModelSource(model=base, motion=motion, style=style)).unet.state_dict(), moved)
    with pytest.raises(ValueError, match=r"pan\.ckpt.*temporal"):
        load_sum(ModelSource(model=base, style=(str(tmp_path / "pan.ckpt"),)))


def test_temporal_layers_of_another_width_are_refused(files, tmp_path):
    save_file(standins.fill(standins.animatelcm_t2v((32, 64, 64, 64))), tmp_path / "thin.safetensors")
    model = load_sum(ModelSource(model=str(files / "base.safetensors")))
    with pytest.raises(ValueError, match=r"thin\.safetensors.*32, 64, 64, 64.*32, 64, 128, 128"):
        with_temporal_layers(model, tmp_path / "thin.safetensors")


def test_a_sum_that_keeps_nothing_is_the_same_sum(files):
    source = ModelSource(
        model=str(files / "base.safetensors"),
        motion=str(files / "motion.ckpt"),
        style=(str(files / "fast.safetensors"),),
    )
    kept, bare = load_sum(source), load_sum(source, keep=False)
    assert kept.kept
    assert not bare.kept
    for part, network in kept.networks.items():
        assert same_state(bare.networks[part].state_dict(), network.state_dict())


# Adapters


SMALL_CONTROL = {"block_out_channels": standins.SMALL, "cross_attention_dim": TEXT}
CONTROL = {"_class_name": "ControlNetModel", **SMALL_CONTROL}
T2I = {"_class_name": "T2IAdapter", "channels": list(standins.SMALL)}
ENCODER = {"_class_name": "ImageEncoder", "channels": list(standins.SMALL)}
TOKENS = {"_class_name": "ImageTokens", "in_channels": 4, "text_channels": TEXT}


def _base(files, **fields) -> ModelSource:
    return ModelSource(model=str(files / "base.safetensors"), **fields)


@pytest.fixture(scope="module")
def plain(files):
    return load_sum(_base(files))


@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
@pytest.mark.parametrize("flag", ["motion", "adapter"])
def test_an_image_to_video_file_brings_its_encoder(files, tmp_path, container, flag):
    state = standins.fill(standins.animatelcm_i2v(), torch.float16, seed=6)
    file = standins.write(state, tmp_path / f"AnimateLCM_sd15_i2v.{container}")
    encoder = {key.removeprefix("img_encoder."): v for key, v in state.items() if key.startswith("img_encoder.")}
    given = {"motion": str(file)} if flag == "motion" else {"adapter": (f"i2v={file}",)}
    model = load_sum(_base(files, **given))
    found = model.adapters["i2v"].state_dict()
    assert found.keys() == encoder.keys()
    assert all(torch.equal(value, encoder[key].float()) for key, value in found.items())
    assert list(model.adapters) == ["i2v"]
    if flag == "motion":
        assert (model.schedule.beta_end, model.schedule.solver_steps, model.facts.sampler) == (0.014, 200, "lcm")
        plain = with_temporal_layers(model, files / "motion.ckpt")
        assert not plain.adapters  # the encoder was made for the layers that are gone


def test_adapters_of_diffusers_stand_beside_the_model(files, tmp_path):
    torch.manual_seed(0)
    networks = {"canny": ControlNetModel(**SMALL_CONTROL), "edge": T2IAdapter(channels=list(standins.SMALL))}
    networks["tile"] = T2IAdapter(channels=list(standins.SMALL[:3]), in_channels=1, adapter_type="light_adapter")
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name, variant="fp16" if name == "edge" else None)
    model = load_sum(_base(files, adapter=tuple(f"{name}={tmp_path / name}" for name in networks)), adapters=("canny",))
    assert list(model.adapters) == ["canny", "edge", "tile"]
    for name, network in networks.items():
        ours = model.adapters[name].state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.adapters["canny"].parameters())


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("edge", {"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel', which is no adapter"),
        ("edge", {"_class_name": ["ControlNetModel"]}, "which is no adapter"),
        ("edge", {}, "None, which is no adapter"),
        ("i2v", CONTROL, "is a ControlNetModel, which 'i2v' does not name"),
        ("i2v", T2I, "is a T2IAdapter, which 'i2v' does not name"),
        ("edge", ENCODER, "is a ImageEncoder, which 'edge' does not name"),
        ("edge", {**CONTROL, "block_out_channels": [320, 640, 1280, 1280]}, "block_out_channels=.*320.* needs .*32,"),
        ("edge", {"_class_name": "ControlNetModel"}, "block_out_channels=.*320"),
        # of another family, with the same widths: Stable Diffusion 2, and Stable Diffusion XL
        ("edge", {**CONTROL, "cross_attention_dim": 1024}, "cross_attention_dim=1024.* needs 64"),
        ("edge", {**T2I, "adapter_type": "full_adapter_xl", "downscale_factor": 16}, "downscale_factor=16.* needs 8"),
        ("edge", {**T2I, "adapter_type": "full_adapter_xl"}, "adapter_type='full_adapter_xl'"),
        ("edge", {**CONTROL, "addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ("edge", {**CONTROL, "conditioning_embedding_out_channels": [16, 32]}, "encoder of maps.*needs 4"),
        ("edge", {**T2I, "channels": [32, 64, 64, 64]}, "channels="),
        ("edge", {**T2I, "adapter_type": "light_adapter"}, r"channels=\[32, 64, 128, 128\].* needs \(32, 64, 128\)"),
        ("i2v", {**ENCODER, "channels": [96, 160]}, "channels="),
        ("i2v", {**ENCODER, "in_channels": 16}, "in_channels=16.* needs 4"),
        ("i2v", {**ENCODER, "sees": "pixels"}, "in_channels=4.* needs 3"),
        ("i2v", {**ENCODER, "in_channels": 3, "sees": "pixels", "downscale": 4}, "downscale=4.* needs 8"),
        ("i2v", {**TOKENS, "text_channels": 768}, "text_channels=768.* needs 64"),
        ("i2v", {"_class_name": "ImageTokens"}, "in_channels=None"),
        # sizes without end: these folders hold no weights, so nothing is read, and nothing is built
        ("edge", {**CONTROL, "in_channels": 10**12}, "in_channels=1000000000000"),
        ("edge", {**CONTROL, "layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ("edge", {**CONTROL, "block_out_channels": [10**9] * 4}, "block_out_channels="),
        ("edge", {**CONTROL, "block_out_channels": [32] * 10**5}, "block_out_channels="),
        ("edge", {**CONTROL, "transformer_layers_per_block": 10**9}, "transformer_layers_per_block="),
        ("edge", {**CONTROL, "conditioning_channels": 10**12}, "conditioning_channels="),
        ("edge", {**CONTROL, "conditioning_embedding_out_channels": [16, 32, 96, 10**9]}, "encoder of maps"),
        ("edge", {**CONTROL, "conditioning_embedding_out_channels": [16] * 10**5}, "encoder of maps"),
        ("edge", {**CONTROL, "conditioning_embedding_out_channels": "wide"}, "encoder of maps"),
        ("edge", {**CONTROL, "encoder_hid_dim": 10**12}, "encoder_hid_dim="),
        ("edge", {**CONTROL, "num_class_embeds": 10**12}, "num_class_embeds="),
        ("edge", {**CONTROL, "class_embed_type": "projection"}, "class_embed_type="),
        ("edge", {**CONTROL, "num_attention_heads": 10**9}, "num_attention_heads="),
        ("edge", {**T2I, "num_res_blocks": 10**9}, "num_res_blocks=1000000000"),
        ("edge", {**T2I, "in_channels": 10**12}, "in_channels="),
        ("i2v", {**ENCODER, "downscale": 10**6}, "downscale="),
        ("i2v", {**TOKENS, "in_channels": 10**12}, "in_channels="),
        ("edge", CONTROL, "weights are missing"),
        ("edge", T2I, "weights are missing"),
        ("i2v", ENCODER, "weights are missing"),
        ("i2v", TOKENS, "weights are missing"),
    ],
)
def test_an_adapter_that_cannot_be_is_a_sentence(plain, tmp_path, name, config, named, monkeypatch):
    monkeypatch.setattr("animatelcm.assembly.load", lambda *_, **__: replace(plain, adapters={}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named) as caught:
        load_sum(ModelSource(adapter=(f"{name}={tmp_path}",)))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ("edge=no/such/folder", "no/such/folder"),
        ("edge=FOLDER", r"has no config\.json"),
        ("edge=FOLDER/motion.safetensors", "is a motion module; of those an adapter is only"),
        ("i2v=FOLDER/motion.safetensors", "is a motion module; of those an adapter is only"),
        ("i2v=FOLDER/thin.safetensors", r"thin\.safetensors.*\(32, 64, 64, 64\).*\(32, 64, 128, 128\)"),
    ],
)
def test_a_place_without_an_adapter_is_a_sentence(files, tmp_path, adapter, named):
    save_file(standins.fill(standins.animatelcm_t2v()), tmp_path / "motion.safetensors")
    save_file(standins.fill(standins.animatelcm_i2v((32, 64, 64, 64))), tmp_path / "thin.safetensors")
    with pytest.raises(ValueError, match=named):
        load_sum(_base(files, adapter=(adapter.replace("FOLDER", str(tmp_path)),)))


def test_what_is_wanted_and_not_there_is_said_beside_what_is_there(fresh_model, tmp_path):
    """Of a bundle's adapters only those that are wanted are loaded; the others are named all the same."""
    save(beside(fresh_model, "edge", "i2v"), tmp_path / "model")
    place = Path(tmp_path / "model")
    assert list(load_sum(ModelSource(model=str(place)), adapters=("edge",)).adapters) == ["edge"]
    with pytest.raises(ValueError, match=r"depth maps is needed.* edge, i2v; add one with --adapter depth=PLACE"):
        load_sum(ModelSource(model=str(place)), adapters=("depth",))
    own = (f"depth={place / 'adapters' / 'edge'}",)
    assert list(load_sum(ModelSource(model=str(place), adapter=own), adapters=("depth",)).adapters) == ["depth"]
    assert list(load_sum(ModelSource(model=str(place))).adapters) == ["edge", "i2v"]
