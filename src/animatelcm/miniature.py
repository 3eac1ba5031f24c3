"""The miniature before training: the emoji bundle with random weights and a vocabulary of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch

from animatelcm.data.emoji import COLOURS, STYLE_WORDS
from animatelcm.data.sprites import CLIP_FPS, MOTIONS, SMALL_CONCEPTS, SpritePack
from animatelcm.model import Facts, VideoModel
from animatelcm.nets import emoji as shapes
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import BOS, EOS, WORD_END, Tokenizer, encoder


def fresh(seed: int = 0) -> VideoModel:
    """The emoji bundle with random weights and without temporal layers (``model.with_motion`` adds them)."""
    tokenizer = build_tokenizer(corpus(SpritePack()), shapes.VOCABULARY, shapes.TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoModel(
            unet=VideoUNet(UNetConfig.from_diffusers(shapes.UNET), None),
            vae=Autoencoder(AutoencoderConfig(**shapes.VAE)),
            text_encoder=TextEncoder(
                TextConfig(**shapes.TEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
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


def build_tokenizer(texts: Iterable[str], size: int, length: int) -> Tokenizer:
    """CLIP's tokenizer with ``size`` tokens, their merges learned from ``texts``, which it cuts at ``length``."""
    from tokenizers import pre_tokenizers, trainers

    trained = encoder({BOS: 0, EOS: 1}, [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
    )
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    return Tokenizer.from_merges(merges[: size - 2 - 2 * len(alphabet)], length)
