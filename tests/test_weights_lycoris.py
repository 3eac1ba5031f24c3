"""LoHa and LoKr: what they add to a weight, against PEFT's layers with the same factors; what is wrong is named."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoHaConfig, LoHaModel, LoKrConfig, LoKrModel
from safetensors.torch import save_file
from torch import nn

from animatelcm.conversion import convert
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import LoraLayer, read_lora, write_lora

MODULES = ["unet.time_embedding.linear_1", "unet.conv_in", "unet.conv_out", "text_encoder.text_model.final"]
PATHS = {"time_embedding.linear_1": "time_embedding_linear_1", "conv_in": "conv_in", "conv_out": "conv_out"}
STEM = "lora_unet_conv_in"


class Small(nn.Module):
    """A linear map, a convolution, and one of a single pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(24, 36)})
        self.conv_in, self.conv_out = nn.Conv2d(12, 16, 3), nn.Conv2d(18, 8, 1)

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"unet.{name}": value.detach().clone() for name, value in self.named_parameters()}


def _drawn(kind, **options):
    """PEFT's layers with random factors: the tensors of a file, and what each module's weight gets."""
    torch.manual_seed(3)
    model = Small()
    base = model.weights()
    peft, config = {"LoHa": (LoHaModel, LoHaConfig), "LoKr": (LoKrModel, LoKrConfig)}[kind]
    tuned = peft(model, config(target_modules=list(PATHS), init_weights=False, **options), "default")
    state, deltas = {}, {}
    for path, name in PATHS.items():
        layer = tuned.model.get_submodule(path)
        deltas[f"unet.{path}"] = layer.get_delta_weight("default").detach()
        for key, value in layer.named_parameters():
            if key.startswith(("hada_", "lokr_")):
                state[f"lora_unet_{name}.{key.removesuffix('.default')}"] = value.detach().clone()
        state[f"lora_unet_{name}.alpha"] = torch.tensor(float(options["alpha"]))
    return base, state, deltas


@pytest.mark.parametrize(
    ("kind", "options", "has"),
    [
        ("LoHa", {"r": 3, "alpha": 6}, "hada_w2_b"),
        ("LoHa", {"r": 3, "alpha": 1, "use_effective_conv2d": True}, "hada_t1"),
        ("LoKr", {"r": 2, "alpha": 6, "decompose_factor": 2}, "lokr_w2_a"),
        ("LoKr", {"r": 2, "alpha": 1, "use_effective_conv2d": True, "decompose_factor": 2}, "lokr_t2"),
        ("LoKr", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}, "lokr_w1_a"),
        ("LoKr", {"r": 20, "alpha": 20}, "lokr_w2"),  # PEFT scales it by alpha / rank, LyCORIS has them equal
    ],
)
def test_what_is_added_is_pefts(tmp_path, kind, options, has):
    base, state, deltas = _drawn(kind, **options)
    assert any(key.endswith("." + has) for key in state)
    save_file(state, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", MODULES)
    assert lora.keys() == deltas.keys()
    assert {layer.kind for layer in lora.values()} == {kind}
    for module, delta in deltas.items():
        torch.testing.assert_close(lora[module].delta(delta.shape), delta)
    sums = fused(base, [(lora, -0.5)])
    for module, delta in deltas.items():
        torch.testing.assert_close(sums[f"{module}.weight"], base[f"{module}.weight"] - 0.5 * delta)


def test_a_plain_layer_may_stand_beside_them_and_an_alpha_be_absent(tmp_path):
    _, state, deltas = _drawn("LoHa", r=3, alpha=3)  # as the rank, which is what an absent one means
    state = {key: value.half() for key, value in state.items() if key.startswith(STEM) and not key.endswith("alpha")}
    down, up = torch.randn(2, 24), torch.randn(36, 2)
    plain = {"lora_unet_time_embedding_linear_1.lora_down.weight": down}
    plain["lora_unet_time_embedding_linear_1.lora_up.weight"] = up
    save_file(state | plain, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", MODULES)
    assert isinstance(lora["unet.time_embedding.linear_1"], LoraLayer)
    delta = deltas["unet.conv_in"]
    torch.testing.assert_close(lora["unet.conv_in"].delta(delta.shape), delta, atol=0.02, rtol=0.01)


def test_pefts_own_file_is_refused_for_its_scale_is_beside_it(tmp_path):
    _, state, _ = _drawn("LoKr", r=2, alpha=6)
    save_file(
        {key: value for key, value in state.items() if "alpha" not in key}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text('{"alpha": 6, "r": 2}')
    with pytest.raises(ValueError, match=r"scale of PEFT's LoHa and LoKr is in its adapter_config\.json"):
        read_lora(tmp_path / "adapter_model.safetensors", MODULES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hada_w1_b": None}, "has no w1_b"),
        ({"hada_w1_a": None, "hada_w1_b": None}, "has no w1_a"),
        ({"hada_w1_b": torch.ones(4, 54)}, "has factors of w1 that do not fit: (16, 3) and (4, 54)"),
        ({"hada_w2_b": torch.ones(3, 6)}, "has matrices that do not go together: (16, 108) and (16, 6)"),
        ({"hada_w2_b": torch.full((3, 54), torch.nan)}, "hada_w2_b holds numbers"),
        ({"hada_w2_b": torch.ones(3, 54, dtype=torch.int64)}, "hada_w2_b holds numbers"),
        ({"hada_t1": torch.ones(3, 3, 3)}, "has factors of w1 that do not fit"),
        ({"alpha": torch.ones(2)}, "has an alpha that is no number"),
        ({"alpha": torch.tensor(torch.inf)}, "has an alpha that is no number"),
        ({"dora_scale": torch.ones(1)}, "DoRA"),
        (
            {"lora_down.weight": torch.ones(2, 12, 3, 3), "lora_up.weight": torch.ones(16, 2, 1, 1)},
            "is the second change",
        ),
    ],
)
def test_what_is_wrong_with_a_layer_is_said(tmp_path, change, named):
    _, state, _ = _drawn("LoHa", r=3, alpha=3)
    state = {key: value for key, value in state.items() if key.startswith(STEM)}
    state |= {f"{STEM}.{name}": value for name, value in change.items() if value is not None}
    save_file(
        {k: v for k, v in state.items() if change.get(k.removeprefix(f"{STEM}."), v) is not None}, tmp_path / "x.pt"
    )
    (tmp_path / "x.pt").rename(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors: {STEM}.*{re.escape(named)}"):
        read_lora(tmp_path / "x.safetensors", MODULES)


def test_the_first_matrix_of_a_kronecker_product_is_one(tmp_path):
    factors = {"lokr_w1": torch.ones(2, 2, 3, 3), "lokr_w2": torch.ones(8, 6)}
    save_file({f"{STEM}.{name}": value for name, value in factors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="has matrices that do not go together"):
        read_lora(tmp_path / "x.safetensors", MODULES)


def test_one_for_another_architecture_is_refused(tmp_path):
    base, state, _ = _drawn("LoKr", r=3, alpha=3)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="lora_unet_conv_out is for a module that the model does not have"):
        read_lora(tmp_path / "x.safetensors", MODULES[:2])
    lora = read_lora(tmp_path / "x.safetensors", MODULES)
    base["unet.conv_in.weight"] = torch.zeros(16, 7, 3, 3)
    with pytest.raises(ValueError, match=r"conv_in\.weight is \(16, 7, 3, 3\) in the model"):
        fused(base, [(lora, 1.0)])


def test_it_has_no_form_as_a_plain_lora(tmp_path):
    shapes = {"hada_w1_a": (320, 2), "hada_w1_b": (2, 36), "hada_w2_a": (320, 2), "hada_w2_b": (2, 36)}
    save_file({f"{STEM}.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: a LoHa has no form as a LoRA of low rank"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", to="peft")
    with pytest.raises(ValueError, match=r"y\.safetensors: a LoHa has no form as a LoRA of low rank"):
        write_lora(read_lora(tmp_path / "x.safetensors", MODULES), tmp_path / "y.safetensors", metadata={})
    assert not (tmp_path / "y.safetensors").exists()
