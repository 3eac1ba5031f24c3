"""CLIP's text encoder with the classic parameter names: those of every Stable Diffusion folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.nets.layers import Linear

ACTIVATIONS = ("quick_gelu", "gelu")
LIMITS = {
    "vocab_size": 1_000_000,
    "hidden_size": 16_384,
    "intermediate_size": 65_536,
    "num_hidden_layers": 128,
    "num_attention_heads": 16_384,
    "max_position_embeddings": 65_536,
}
"""What decides how much is built before any weight is seen; a stranger's config may ask for any number."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The settings of transformers' CLIPTextModel: shapes, and what other programs want to know beside them."""

    vocab_size: int = 49_408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49_406
    eos_token_id: int | None = 49_407

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"text encoder: {name}={value!r} is out of range; choose 1..{most}")
        for name in ("layer_norm_eps", "initializer_factor"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"text encoder: {name}={getattr(self, name)!r}; give a number")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text encoder: hidden_size={self.hidden_size} does not split into "
                f"num_attention_heads={self.num_attention_heads}; choose a divisor"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"text encoder: hidden_act={self.hidden_act!r} is not supported; choose from {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> TextConfig:
        """From ``text_encoder/config.json``, whose many notes on other uses of a text model are left aside."""
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names})

    def to_transformers(self) -> dict[str, Any]:
        """The contents of ``text_encoder/config.json``; where nobody says a type, weights in half are to be read as
        diffusers reads those of its own networks: in float32."""
        facts = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"}
        return asdict(self) | facts


class TextEncoder(nn.Module):
    """Tokens to what a UNet attends to: CLIP's transformer up to its last norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self._draw()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.words.dtype

    @property
    def words(self) -> Tensor:
        """The embedding of each token, (vocabulary, D)."""
        return self.text_model.embeddings.token_embedding.weight

    def forward(self, tokens: Tensor, added: Tensor | None = None, clip_skip: int = 1) -> Tensor:
        """Tokens int64 (B, L) -> a layer's (B, L, D), normed: the last one's, or the ``clip_skip``-th from the end.

        Tokens beyond the vocabulary are rows of ``added``, (N, D). Layers are counted as A1111 counts them; diffusers'
        ``clip_skip`` is one less. Raises ValueError where there are fewer layers.
        """
        return self.text_model(tokens, added, clip_skip)

    @torch.no_grad()
    def _draw(self) -> None:
        """Random weights as CLIP begins with them: what layers add shrinks with their number."""
        width, scale = self.config.hidden_size, self.config.initializer_factor
        deep = (2 * self.config.num_hidden_layers) ** -0.5
        for embedding in self.text_model.embeddings.children():
            nn.init.normal_(embedding.weight, std=0.02 * scale)
        for layer in self.text_model.encoder.layers:
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.fc2):
                nn.init.normal_(linear.weight, std=width**-0.5 * deep * scale)
            nn.init.normal_(attention.out_proj.weight, std=width**-0.5 * scale)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5 * scale)
            for linear in (*attention.children(), *layer.mlp.children()):
                nn.init.zeros_(linear.bias)


class TextTransformer(nn.Module):
    """Embeddings, layers, norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, tokens: Tensor, added: Tensor | None = None, clip_skip: int = 1) -> Tensor:
        layers = self.encoder.layers
        if not 1 <= clip_skip <= len(layers):
            most = len(layers)
            raise ValueError(
                f"clip_skip={clip_skip}, and this text encoder has {most} layers; choose 1 (all) to {most}"
            )
        x = self.embeddings(tokens, added)
        for layer in layers[: len(layers) + 1 - clip_skip]:
            x = layer(x)
        return self.final_layer_norm(x)


class Embeddings(nn.Module):
    """What a token is, and where it stands."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor, added: Tensor | None = None) -> Tensor:
        """(B, L), and what stands for tokens beyond the vocabulary, (N, D) -> (B, L, D)."""
        places = self.position_embedding.num_embeddings
        if tokens.shape[1] > places:
            raise ValueError(f"{tokens.shape[1]} tokens, and this text encoder has {places} places; cut the text")
        positions, known = self.position_embedding.weight[: tokens.shape[1]], self.token_embedding.num_embeddings
        if added is None:
            return self.token_embedding(tokens) + positions
        words, others = self.token_embedding(tokens.clamp(max=known - 1)), tokens >= known
        words[others] = added.to(words)[tokens[others] - known]
        return words + positions


class TextLayer(nn.Module):
    """Attention to the tokens before, and a feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CausalAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, channels)
        self.out_proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in projections)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
