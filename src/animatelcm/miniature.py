"""The miniature before training: the emoji bundle with random weights and a vocabulary of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from animatelcm.data.emoji import COLOURS, STYLE_WORDS
from animatelcm.data.sprites import CLIP_FPS, MOTIONS, SMALL_CONCEPTS, SpritePack
from animatelcm.model import Facts, VideoModel
from animatelcm.nets import emoji as shapes
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.schedule import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def fresh(seed: int = 0) -> VideoModel:
    """The emoji bundle with random weights and without temporal layers (``model.with_motion`` adds them)."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer(corpus(SpritePack()), shapes.VOCABULARY, shapes.TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoModel(
            unet=VideoUNet(UNetConfig.from_diffusers(shapes.UNET), None),
            vae=AutoencoderKL(**shapes.VAE),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(**shapes.TEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
            ),
            tokenizer=tokenizer,
            schedule=NoiseSchedule(),
            facts=Facts(
                name="emoji",
                width=shapes.PIXELS,
                height=shapes.PIXELS,
                num_frames=shapes.FRAMES,
                fps=float(CLIP_FPS),
                num_inference_steps=25,
                guidance_scale=4.0,
            ),
        )
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model.to("cpu")


def corpus(pack: SpritePack) -> list[str]:
    """Texts whose words deserve tokens: the captions' fixed words most of all, then subjects, then keywords."""
    fixed = " ".join(["a an on background", *COLOURS, *MOTIONS, *STYLE_WORDS.values()])
    small = [pack.concepts[slug].name for slug in SMALL_CONCEPTS]
    names = [concept.name for concept in pack.concepts.values()]
    keywords = [word for concept in pack.concepts.values() for word in concept.keywords]
    return [fixed] * 2000 + small * 200 + names * 5 + keywords


def build_tokenizer(texts: Iterable[str], size: int, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer with byte-pair merges learned from ``texts``.

    CLIP's vocabulary order: 256 bytes, 256 bytes that end a word, merges, start and end of text; texts are cut at
    ``length`` tokens.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trained = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = merges[: size - 2 - len(words)]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: i for i, word in enumerate([*words, BOS, EOS])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length, pad_token=EOS)
