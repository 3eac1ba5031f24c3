from __future__ import annotations

import time

import pytest
import torch

import standins
from animatelcm.weights.families import FAMILIES
from animatelcm.weights.files import TensorInfo, read_header
from animatelcm.weights.identify import FileKind, identify
from standins import SD15, SMALL, TEXT, VAE, header

UNET, AUTOENCODER, CLIP = 859_520_964, 83_653_863, 123_060_480


def what(shapes: standins.Shapes, dtype: torch.dtype = torch.float32) -> FileKind:
    return identify(header(shapes, dtype))


def under(prefix: str, shapes: standins.Shapes) -> standins.Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


def peft(shapes: standins.Shapes) -> standins.Shapes:
    """A kohya file's layers as diffusers saves them now, with names that need not exist."""
    ends = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
    return {
        "unet." + key.removeprefix("lora_unet_").replace(end, new): shape
        for key, shape in shapes.items()
        for end, new in ends.items()
        if key.endswith(end)
    }


# What is published


@pytest.mark.parametrize(
    ("file", "tensors", "parameters", "modules", "rows", "family"),
    [
        (standins.mm_v1, 560, 417.14, 20, 24, "animatediff-v1"),
        (standins.mm_v2, 588, 453.21, 21, 32, "animatediff-v2"),
        (standins.mm_v3, 560, 417.14, 20, 32, "animatediff-v3"),
        (standins.animatelcm_t2v, 546, 453.21, 21, None, "animatelcm-t2v"),
        (standins.animatelcm_i2v, 584, 530.04, 21, None, "animatelcm-i2v"),
    ],
)
def test_motion_modules_are_as_large_as_published(file, tensors, parameters, modules, rows, family):
    found = what(file(SD15))
    assert (found.kind, found.layout, found.family) == ("motion", "animatediff", family)
    assert (found.tensors, found.modules, found.rows) == (tensors, modules, rows)
    assert round(found.parameters / 1e6, 2) == parameters
    assert found.mid_block == (modules == 21)
    assert found.image_encoder == family.endswith("i2v")


def test_loras_are_as_large_as_published():
    lcm = what(standins.lcm_lora(SD15, TEXT), torch.float16)
    assert (lcm.kind, lcm.layout, lcm.family) == ("lora", "kohya", "lcm-lora")
    assert (lcm.modules, lcm.parameters, lcm.ranks) == (278, 67_252_224, (64,))
    motion = what(standins.motion_lora(SD15))
    assert (motion.kind, motion.layout, motion.family) == ("motion_lora", "animatediff", "animatediff-v2")
    assert (motion.tensors, motion.parameters, motion.ranks) == (336, 19_333_120, (64,))
    domain = what(standins.domain_adapter(SD15, TEXT))
    assert (domain.kind, domain.layout, domain.family) == ("lora", "old-diffusers", "animatediff-v3")
    assert (domain.tensors, round(domain.parameters / 1e6, 1), domain.ranks) == (256, 25.5, (128,))


@pytest.mark.parametrize("ema", [True, False])
def test_stable_diffusion_is_as_large_as_published(ema):
    shapes = standins.ldm_checkpoint(SD15, VAE, TEXT, ema=ema)
    found = what(shapes)
    assert (found.kind, found.layout, found.family) == ("checkpoint", "ldm", "stable-diffusion-1.5")
    assert found.parameters == UNET + AUTOENCODER + CLIP
    assert (found.vae, found.text_encoder, found.ema, found.text_width) == (True, True, ema, 768)
    assert found.types == ("F32", "I64")
    assert (what(standins.ldm_unet(SD15, TEXT)).parameters, what(standins.ldm_vae(VAE)).parameters) == (
        UNET,
        AUTOENCODER,
    )
    assert what(standins.clip_text(TEXT)).parameters == CLIP


# What diffusers and transformers make of the stand-ins


def meta(shapes: standins.Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(state: dict[str, torch.Tensor]) -> standins.Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("channels", "text"), [(SMALL, 16), (SD15, TEXT)])
def test_diffusers_finds_its_unet_in_the_checkpoint(channels, text):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    checkpoint = meta(standins.ldm_checkpoint(channels, text=text))
    converted = convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": 2})
    assert shapes_of(converted) == standins.unet(channels, text)


@pytest.mark.parametrize("channels", [SMALL, VAE])
def test_diffusers_finds_its_autoencoder_in_the_checkpoint(channels):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=channels, latent_channels=4, layers_per_block=2, **kinds)
    converted = convert_ldm_vae_checkpoint(meta(standins.ldm_checkpoint(vae=channels)), dict(vae.config))
    assert shapes_of(converted) == shapes_of(vae.state_dict())


def test_transformers_finds_its_text_encoder_in_the_checkpoint():
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig())
    theirs = {key.removeprefix("text_model."): shape for key, shape in shapes_of(model.state_dict()).items()}
    prefix = "cond_stage_model.transformer.text_model."
    checkpoint = standins.ldm_checkpoint(text=512)
    ours = {key.removeprefix(prefix): shape for key, shape in checkpoint.items() if key.startswith(prefix)}
    assert {key: shape for key, shape in ours.items() if not key.endswith("position_ids")} == {
        key: shape for key, shape in theirs.items() if not key.endswith("position_ids")
    }


def test_diffusers_takes_every_layer_of_the_latent_consistency_lora():
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    state = standins.fill(standins.lcm_lora(rank=1))
    assert len(state) == 3 * 278
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(state))
    assert len(converted) == 2 * 278
    assert set(alphas.values()) == {8.0}


# Kinds and layouts

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PROCESSOR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
PAIR = {f"{KOHYA}.lora_down.weight": (4, 32), f"{KOHYA}.lora_up.weight": (32, 4)}
MOTION_PEFT = "unet.mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q"


def diffusers_motion(rows: int, *, mid: bool) -> standins.Shapes:
    from diffusers import MotionAdapter

    settings = {"use_motion_mid_block": mid, "motion_max_seq_length": rows}
    with torch.device("meta"):
        return shapes_of(MotionAdapter(block_out_channels=SMALL, **settings).state_dict())


@pytest.mark.parametrize(
    ("shapes", "kind", "layout", "family"),
    [
        (standins.ldm_checkpoint, "checkpoint", "ldm", ""),
        (lambda: under("model.diffusion_model.", standins.ldm_unet(SD15, TEXT)), "unet", "ldm", "stable-diffusion-1.5"),
        (standins.ldm_unet, "unet", "ldm", ""),
        (lambda: standins.unet(SD15, TEXT), "unet", "diffusers", "stable-diffusion-1.5"),
        (lambda: standins.unet(SD15, 1024), "unet", "diffusers", ""),
        (standins.ldm_vae, "vae", "ldm", ""),
        (lambda: under("first_stage_model.", standins.ldm_vae()), "vae", "ldm", ""),
        (lambda: {"encoder.down_blocks.0.resnets.0.norm1.weight": (3,)}, "vae", "diffusers", ""),
        (standins.clip_text, "text_encoder", "diffusers", ""),
        (lambda: under("cond_stage_model.transformer.", standins.clip_text()), "text_encoder", "ldm", ""),
        (lambda: {"embeddings.token_embedding.weight": (9, 8)}, "text_encoder", "diffusers", ""),
        (lambda: under("control_model.", standins.ldm_unet()), "controlnet", "ldm", ""),
        (lambda: {"controlnet_down_blocks.0.weight": (3,), "conv_in.weight": (3,)}, "controlnet", "diffusers", ""),
        (lambda: {"controlnet_cond_embedding.weight": (3,)} | standins.mm_v3(), "sparsectrl", "diffusers", ""),
        (lambda: under("module.", standins.mm_v3() | standins.unet()), "motion", "animatediff", "animatediff-v3"),
        (lambda: diffusers_motion(24, mid=False), "motion", "diffusers", "animatediff-v1"),
        (lambda: diffusers_motion(32, mid=False), "motion", "diffusers", "animatediff-v3"),
        (lambda: diffusers_motion(32, mid=True), "motion", "diffusers", ""),
        (lambda: standins.motion((32, 64), mid=True), "motion", "animatediff", ""),
        (lambda: standins.motion(mid=False), "motion", "animatediff", ""),
        (lambda: standins.motion(rows=48), "motion", "animatediff", ""),
        (lambda: PAIR, "lora", "kohya", ""),
        (lambda: standins.lcm_lora(rank=32), "lora", "kohya", ""),
        (lambda: standins.lcm_lora() | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "lora", "kohya", ""),
        (lambda: peft(PAIR), "lora", "peft", ""),
        (lambda: {f"unet.{PROCESSOR}.down.weight": (4, 32)}, "lora", "old-diffusers", ""),
        (lambda: under("unet.", standins.domain_adapter()), "lora", "old-diffusers", ""),
        (lambda: standins.domain_adapter(rank=4), "lora", "old-diffusers", ""),
        (lambda: {f"{MOTION_PEFT}.lora_A.weight": (4, 32)}, "motion_lora", "peft", ""),
        (lambda: {f"{MOTION_PEFT}.lora_A.weight": (4, 32)} | peft(PAIR), "lora", "peft", ""),
        (lambda: {"emb_params": (4, 768)}, "embedding", "", ""),
        (lambda: {"fc.weight": (4, 4)}, "unknown", "", ""),
        (dict, "unknown", "", ""),
    ],
)
def test_kinds_layouts_and_families(shapes, kind, layout, family):
    shapes = shapes()
    found = what(shapes)
    assert (found.kind, found.layout, found.family) == (kind, layout, family)
    assert not found.family or found.family in FAMILIES
    assert found.tensors == len(shapes)


@pytest.mark.parametrize(
    ("end", "method"),
    [
        (".hada_w1_a", "LoHa"),
        (".lokr_w1", "LoKr"),
        (".lokr_w1_a", "LoKr"),
        (".dora_scale", "DoRA"),
        (".lora_magnitude_vector", "DoRA"),
        (".lora_magnitude_vector.style.weight", "DoRA"),
        (".lora_mid.weight", "LoCon with a middle matrix (Tucker form)"),
        (".oft_blocks", "OFT"),
        (".oft_diag", "OFT"),
        (".on_input", "IA3"),
        *((f".{name}.weight", "GLoRA") for name in ("a1", "a2", "b1", "b2")),
        (".diff", "full differences of weights"),
        (".diff_b", "full differences of weights"),
    ],
)
@pytest.mark.parametrize("beside", [{}, PAIR], ids=["alone", "beside a plain layer"])
def test_what_is_no_plain_lora_is_named(end, method, beside):
    found = what({f"{KOHYA}{end}": (4, 32)} | beside)
    assert (found.kind, found.layout, found.method) == ("lora", "lycoris", method)
    assert method in str(found)
    assert "LyCORIS" in str(found)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (
            lambda: standins.animatelcm_t2v(SD15),
            "AnimateLCM motion module (AnimateDiff keys, 21 modules, 453.2 M parameters)",
        ),
        (
            lambda: standins.mm_v1(SD15),
            "AnimateDiff v1 motion module (AnimateDiff keys, 20 modules, 24 positions, 417.1 M parameters)",
        ),
        (lambda: standins.lcm_lora(SD15, TEXT), "LCM-LoRA (kohya keys, 278 modules, rank 64, 67.3 M parameters)"),
        (
            lambda: standins.ldm_checkpoint(SD15, VAE, TEXT, ema=True),
            "Stable Diffusion 1.5 checkpoint (LDM keys, 1066.2 M parameters, with autoencoder, with text encoder, "
            "with averaged copies)",
        ),
        (
            lambda: PAIR | {"lora_te_x.lora_down.weight": (8, 32)},
            "LoRA (kohya keys, 2 modules, rank 4 to 8, 512 parameters, with text encoder)",
        ),
        (dict, "Weights of an unknown kind (0 parameters)"),
    ],
)
def test_one_line_says_it(shapes, text):
    assert str(what(shapes())) == text


@pytest.mark.parametrize(("width", "name"), [(1024, "Stable Diffusion 2 "), (2048, "Stable Diffusion XL ")])
def test_other_architectures_are_told_by_their_text(width, name):
    stem = KOHYA.replace("attn1_to_q", "attn2_to_k")
    lora = what({f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (32, 4)})
    assert lora.text_width == width
    assert str(lora).startswith(name)
    assert what(standins.unet(SMALL, width)).text_width == width


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "trained.ckpt"])
def test_files_are_identified_by_their_headers(name, tmp_path):
    content = standins.fill(standins.animatelcm_i2v((32, 32, 32, 32)), torch.float16)
    path = standins.write(standins.training_checkpoint(content) if "trained" in name else content, tmp_path / name)
    found = identify(read_header(path))
    assert found == what(standins.animatelcm_i2v((32, 32, 32, 32)), torch.float16)
    assert (found.family, found.types) == ("animatelcm-i2v", ("F16",))


@pytest.mark.parametrize("end", [".lora_A.style.weight", ".lora_A.0.weight", ".lora_A.default.weight"])
def test_an_adapter_in_peft_may_have_any_name(end):
    stem = f"unet.{PROCESSOR}".replace("attn1.processor.to_q_lora", "attn2.to_k")
    found = what({f"{stem}{end}": (4, 768), f"{stem}{end.replace('_A', '_B')}": (32, 4)})
    assert (found.kind, found.layout, found.modules, found.ranks, found.text_width) == ("lora", "peft", 1, (4,), 768)


@pytest.mark.parametrize(
    "spelling",
    [
        "{key}.{i}",
        "{i}.{key}",
        "unet.{key}.lora_A.adapter{i}.weight",
        "unet.{key}.lora_B.adapter{i}.weight",
        "lora.{key}.attn2.to_k.{i}.weight",
        "{key}.lora.lora_A.lora.lora_B.{i}.weight",
    ],
)
def test_a_hundred_thousand_tensors_take_less_than_a_second(spelling):
    blocks = [standins.lcm_lora(), standins.mm_v2(), standins.ldm_unet()]
    keys = [key for shapes in blocks for key in shapes]
    many = {spelling.format(key=keys[i % len(keys)], i=i): TensorInfo((4, 32), "F16") for i in range(100_000)}
    before = time.process_time()
    found = identify(many)
    assert time.process_time() - before < 1
    assert found.tensors == 100_000
