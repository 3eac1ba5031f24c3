"""Image encoders written here, in ComfyUI-AnimateDiff-Evolved: read as it reads them, they compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import evolved
import standins
from animatelcm.assembly import load_sum
from animatelcm.conversion import convert
from animatelcm.model_source import ModelSource
from animatelcm.nets.adapters import Adapter, Clues
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig
from animatelcm.saving import save
from animatelcm.weights.keys import image_encoder_shapes, to_diffusers
from animatelcm.weights.motion import write_motion

SMALL = standins.SMALL
"""As Stable Diffusion 1.5's: four levels, of which the last two are alike."""
POSITIONS = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(network: nn.Module) -> nn.Module:
    """Every number random, so that every level answers about as strongly."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(0.5 * noise(*parameter.shape, seed=i) / fan**0.5)
    return network


def hold(
    ours: ImageEncoder, theirs: evolved.Encoder, size: tuple[int, int], scale: float | None, frames: int = 5
) -> None:
    """Features of a picture to be equal, alone and for both halves of guidance; None is the scale of training."""
    theirs.ref_drift = ours.config.motion_scale if scale is None else scale
    image = noise(1, 4, *size, seed=7)
    x, t, text = torch.zeros(1, 4, frames, *size), torch.zeros(1), torch.zeros(1, 1, 1)
    hints = Adapter(ours, motion_scale=scale)(x, t, text, Clues(image=image))
    with torch.no_grad():
        for halves in (1, 2):
            expected = theirs(image.repeat(frames, 1, 1, 1), frames, halves)
            for mine, feature in zip(hints.repeated(halves).features, expected, strict=True):
                assert feature.abs().max() > 0.2
                torch.testing.assert_close(mine.transpose(1, 2).flatten(0, 1), feature, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An image model in one file."""
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(standins.fill(standins.ldm_checkpoint(text=64, layers=1), torch.float16), file)
    return file


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """It with temporal layers and an image encoder that was trained at 0.3, and its folder."""
    folder = tmp_path_factory.mktemp("made")
    save_file(standins.fill(standins.animatelcm_i2v()), folder / "i2v.safetensors")
    model = load_sum(ModelSource(model=str(base), motion=str(folder / "i2v.safetensors")))
    network = drawn(model.adapters["i2v"])
    network.config = replace(network.config, motion_scale=0.3)
    save(model, folder / "model", dtype=torch.float32)
    return model, folder / "model"


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The file that the folder is converted into, in float32."""
    out = tmp_path_factory.mktemp("written") / "i2v.safetensors"
    return convert(model[1], out, to="animatediff", part="i2v", dtype=torch.float32).path


@pytest.mark.parametrize("scale", [None, 0.0, 0.8, 2.0])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 3)])
def test_a_trained_encoder_computes_the_same_there(model, written, size, scale):
    """As rebuilt from its source (``evolved``). ``motion_scale`` is its ``ref_drift``, which no file says."""
    hold(model[0].adapters["i2v"], evolved.loaded(written, SMALL), size, scale)


def test_positions_are_the_same_up_to_the_last_frame(model, written):
    hold(model[0].adapters["i2v"], evolved.loaded(written, SMALL), (2, 2), 1.0, frames=64)


def test_both_read_one_file_alike(model, base, tmp_path):
    """In half precision, as files are by default; there the encoder of a file begins at a ``ref_drift`` of its own."""
    made = convert(model[1], tmp_path / "half.safetensors", to="animatediff", part="i2v").path
    theirs = evolved.loaded(made, SMALL)
    assert theirs.ref_drift == 0.5
    again = load_sum(ModelSource(model=str(base), motion=str(made))).adapters["i2v"]
    assert again.config.motion_scale == 0.3
    hold(again, theirs, (9, 13), 0.8)


def test_the_encoder_of_a_many_step_model_is_read_there_too(model, tmp_path):
    """With positions it would be taken for an AnimateDiff's, which has none."""
    many = replace(model[0], facts=replace(model[0].facts, sampler="ddim"))
    save(many, tmp_path / "model", dtype=torch.float32)
    out = tmp_path / "many.safetensors"
    made = convert(tmp_path / "model", out, to="animatediff", part="i2v", dtype=torch.float32).path
    hold(many.adapters["i2v"], evolved.loaded(made, SMALL), (8, 8), None)


def test_at_full_size_names_and_shapes_are_theirs():
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in evolved.Encoder().state_dict().items()}
        ours = {key: tuple(value.shape) for key, value in ImageEncoder(ImageEncoderConfig()).state_dict().items()}
    assert ours == theirs == image_encoder_shapes(standins.SD15)


@pytest.mark.slow
def test_at_full_size_it_computes_the_same(tmp_path):
    """A file of a gigabyte."""
    half = torch.float16
    motion = {
        to_diffusers(k): torch.zeros(shape, dtype=half) for k, shape in standins.animatelcm_t2v(standins.SD15).items()
    }
    ours = drawn(ImageEncoder(ImageEncoderConfig())).to(half)
    path = tmp_path / "i2v.safetensors"
    write_motion(motion, path, layout="animatediff", dtype=half, image_encoder=ours.state_dict())
    theirs = evolved.loaded(path)
    path.unlink()
    hold(ours.float().eval().requires_grad_(False), theirs, (9, 13), 0.8, frames=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("img_encoder.body.2.in_conv.bias"), r"body\.2\.in_conv\.bias"),
        (lambda state: state.update({"img_encoder.more": torch.ones(1)}), r"img_encoder\.more"),
        (lambda state: state.update({"img_encoder.body.0.block2.weight": torch.ones(32, 32, 3, 3)}), "block2"),
        (lambda state: state.update({"conv_in.weight": torch.ones(1)}), "PIA"),
    ],
)
def test_there_an_encoder_is_taken_whole_or_not_at_all(written, tmp_path, change, named):
    state = load_file(written)
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match=named):
        evolved.loaded(tmp_path / "x.safetensors", SMALL)


def test_there_positions_in_a_file_take_its_encoder_away(written, tmp_path):
    """So a file with an encoder is written without them."""
    state = load_file(written)
    assert not [key for key in state if "pos_" in key]
    positions = {key: value for key, value in standins.fill(standins.mm_v2()).items() if key.endswith(".pe")}
    assert POSITIONS in positions
    save_file(state | positions, tmp_path / "x.safetensors")
    assert evolved.loaded(tmp_path / "x.safetensors", SMALL) is None
