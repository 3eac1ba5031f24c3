"""The text encoder is transformers' CLIPTextModel, under the classic names."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from animatelcm.nets import emoji, sd15
from animatelcm.nets.text_encoder import TextConfig, TextEncoder

SMALL = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
CONFIGS = {
    "miniature": emoji.TEXT,
    "Stable Diffusion, narrow": {
        **sd15.TEXT,
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "eos_token_id": 98,
    },
    "gelu": {**SMALL, "hidden_act": "gelu", "num_hidden_layers": 2, "eos_token_id": 98},
    "coarse norm": {**SMALL, "layer_norm_eps": 1e-2, "num_hidden_layers": 1, "eos_token_id": 98},
}


def pair(settings: dict) -> tuple[TextEncoder, CLIPTextModel]:
    """Both with the same random weights, none of them zero."""
    torch.manual_seed(0)
    theirs = CLIPTextModel(CLIPTextConfig(**settings)).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    ours = TextEncoder(TextConfig.from_transformers(theirs.config.to_dict())).eval().requires_grad_(False)
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_transformers(name, length):
    ours, theirs = pair(CONFIGS[name])
    tokens = torch.randint(0, 99, (3, length), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).last_hidden_state
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = ours(tokens)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_token_knows_those_before_it_alone():
    ours, _ = pair(CONFIGS["gelu"])
    tokens = torch.arange(10)[None]
    other = tokens.clone()
    other[0, 6:] = 50
    with torch.inference_mode():
        assert torch.allclose(ours(tokens)[:, :6], ours(other)[:, :6], atol=1e-5)
        assert not torch.allclose(ours(tokens)[:, 6:], ours(other)[:, 6:], atol=1e-2)


def test_gradients_reach_every_weight():
    ours, _ = pair(CONFIGS["gelu"])
    ours.requires_grad_(True)
    ours(torch.arange(77)[None]).square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in ours.parameters())


def test_random_weights_are_spread_as_theirs():
    torch.manual_seed(0)
    settings = {**emoji.TEXT, "eos_token_id": 98}
    ours, theirs = TextEncoder(TextConfig(**settings)), CLIPTextModel(CLIPTextConfig(**settings))
    spread = {name.removeprefix("text_model."): value.std() for name, value in theirs.state_dict().items()}
    for name, value in ours.state_dict().items():
        assert value.std() == pytest.approx(float(spread[name.removeprefix("text_model.")]), rel=0.1), name


def test_too_many_tokens_are_refused():
    ours, _ = pair(CONFIGS["miniature"])
    with pytest.raises(ValueError, match="33 tokens, and this text encoder has 32 places"):
        ours(torch.zeros(1, 33, dtype=torch.long))


def test_config_goes_there_and_back():
    for settings in CONFIGS.values():
        config = TextConfig.from_transformers(settings)
        written = json.loads(json.dumps(config.to_transformers()))
        assert TextConfig.from_transformers(written) == config
        assert TextConfig.from_transformers(CLIPTextConfig.from_dict(written).to_dict()) == config
    ours, theirs = TextConfig().to_transformers(), CLIPTextConfig().to_dict()
    assert {key: ours[key] for key in ours.keys() - {"architectures", "torch_dtype"}}.items() <= theirs.items()
    assert CLIPTextConfig.from_dict(ours).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"hidden_size": 10**9}, "hidden_size=1000000000 is out of range"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is out of range"),
        ({"vocab_size": "9"}, "vocab_size='9' is out of range"),
        ({"layer_norm_eps": "1"}, "layer_norm_eps='1'; give a number"),
        ({"num_attention_heads": 7}, "choose a divisor"),
        ({"hidden_act": "relu"}, "choose from quick_gelu, gelu"),
    ],
)
def test_what_it_cannot_be_is_refused(settings, what):
    with pytest.raises(ValueError, match=what):
        TextConfig.from_transformers(settings)
