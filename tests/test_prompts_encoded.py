"""What networks see of a prompt: what diffusers has where nothing is marked; weights, chunks and learned words."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from animatelcm.bench import peers
from animatelcm.hub import ASSETS
from animatelcm.nets import sd15
from animatelcm.nets.graphs import Graphs
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample
from animatelcm.tokenizer import Tokenizer, read_merges

LONG = "a parrot and a fox on a blue background, " * 9
NARROW = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def models(fresh_model):
    """By their places: the miniature, and Stable Diffusion's tokenizer before a narrow encoder; all biases act."""
    torch.manual_seed(0)
    clip = Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS)
    made = {32: fresh_model, 77: replace(fresh_model, tokenizer=clip)}
    encoders = deepcopy(fresh_model.text_encoder), TextEncoder(TextConfig(**{**sd15.TEXT, **NARROW}))
    for encoder in encoders:
        for parameter in encoder.requires_grad_(False).eval().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) + 0.02)
    return {n: replace(model, text_encoder=e) for (n, model), e in zip(made.items(), encoders, strict=True)}


@pytest.fixture(params=[32, 77])
def model(request, models):
    return models[request.param]


def theirs_of(model) -> StableDiffusionPipeline:
    """diffusers' pipeline of images as far as it reads prompts."""
    rest = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    networks = {"text_encoder": peers.text_encoder(model.text_encoder), "tokenizer": peers.tokenizer(model.tokenizer)}
    return StableDiffusionPipeline(**rest, **networks, requires_safety_checker=False)


def encoded(pipe: StableDiffusionPipeline, prompt: str, negative: str = "", **options) -> torch.Tensor:
    """[without text, with text], as our sampler has them."""
    said = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    text, no_text = pipe.encode_prompt(prompt, negative_prompt=negative, **said, **options)
    return torch.cat([no_text, text])


@pytest.mark.parametrize("syntax", ["a1111", "plain"])
def test_a_prompt_without_marks_is_diffusers_text(model, syntax):
    texts = ["blurry", "a parrot: on blue, 16:9 :) C:\\x"]
    found = model.embed_prompts(texts, syntax)
    assert torch.equal(found, model.embed(texts))
    assert torch.equal(model.embed_prompts(texts[1:], syntax), model.embed(texts[1:]))
    expected = encoded(theirs_of(model), texts[1], texts[0])
    assert torch.allclose(found, expected, atol=1e-5)


def test_brackets_are_diffusers_letters_where_prompts_are_plain(model):
    prompt = "a (red:1.5) [parrot] BREAK"
    assert torch.equal(model.embed_prompts([prompt], "plain"), model.embed([prompt]))
    assert not torch.allclose(model.embed_prompts([prompt]), model.embed([prompt]), atol=0.01)


def test_each_chunk_of_a_long_prompt_is_encoded_by_itself(model):
    """By transformers' encoder, on tokens that transformers' tokenizer finds."""
    pipe, places = theirs_of(model), model.tokenizer.model_max_length
    tokens = pipe.tokenizer(LONG, add_special_tokens=False, truncation=False).input_ids
    room = places - 2
    parts = [tokens[i : i + room] for i in range(0, len(tokens), room)]
    assert len(parts) > 1
    begin, end = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id
    rows = [[begin, *part, end] + [pipe.tokenizer.pad_token_id] * (room - len(part)) for part in (*parts, [])]
    expected = pipe.text_encoder(torch.tensor(rows)).last_hidden_state
    (short, long) = model.embed_prompts(["", LONG])
    assert long.shape == (len(parts) * places, model.text_encoder.config.hidden_size)
    assert torch.allclose(long, expected[:-1].flatten(0, 1), atol=1e-5)
    assert torch.allclose(short, expected[-1].repeat(len(parts), 1), atol=1e-5)


def test_a_break_begins_a_chunk(model):
    found = model.embed_prompts(["a red parrot BREAK blue"])
    assert torch.allclose(found, model.embed(["a red parrot", "blue"]).flatten(0, 1)[None], atol=1e-6)


def test_weights_multiply_what_the_encoder_says_and_leave_its_mean(model):
    (plain,), (found,) = model.embed(["a red parrot on blue"]), model.embed_prompts(["a (red:1.5) [parrot on] blue"])
    factors = torch.ones(len(plain), 1)
    factors[1:6, 0] = torch.tensor([1, 1.5, 1 / 1.1, 1 / 1.1, 1])
    same = model.tokenizer.spelled
    assert [len(same(word)) for word in ("a", "red", "parrot", "on", "blue")] == [1] * 5
    expected = plain * factors
    assert torch.allclose(found, expected * plain.mean() / expected.mean(), atol=1e-5)
    assert float(found.mean()) == pytest.approx(float(plain.mean()), rel=1e-3)
    assert not torch.allclose(found, expected, atol=1e-3)


def test_weights_of_one_chunk_leave_the_others_and_those_of_one_prompt_leave_its_neighbours(model):
    found = model.embed_prompts(["a (red:1.5) parrot BREAK blue", "fox"])
    plain = model.embed_prompts(["a red parrot BREAK blue", "fox"])
    places = model.tokenizer.model_max_length
    assert torch.equal(found[0, places:], plain[0, places:])
    assert torch.equal(found[1], plain[1])
    assert not torch.allclose(found[0, :places], plain[0, :places], atol=1e-3)


def test_where_the_mean_is_nothing_weights_alone_count(fresh_model):
    """Behind a norm without a bias it is what rounding leaves, and a quotient of two such numbers could be anything."""
    plain = fresh_model.embed(["a parrot"])
    assert float(plain.mean().abs()) < 1e-6
    found = fresh_model.embed_prompts(["(a parrot:2)"])
    assert torch.allclose(found[:, 1:3], 2 * plain[:, 1:3])
    assert torch.equal(found[:, 3:], plain[:, 3:])


def test_skipped_layers_are_transformers_hidden_states_and_diffusers_count_plus_one(model):
    pipe, layers = theirs_of(model), model.text_encoder.config.num_hidden_layers
    tokens = model.tokens(["a parrot"])
    states = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states
    if not hasattr(pipe.text_encoder, "text_model"):  # the older name, by which diffusers 0.42 asks for it
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    norm = pipe.text_encoder.text_model.final_layer_norm
    for skip in range(1, layers + 1):
        found = model.embed_prompts(["a parrot"], clip_skip=skip)
        assert torch.allclose(found, norm(states[-skip]), atol=1e-5)
        if skip > 1:
            assert torch.allclose(found, encoded(pipe, "a parrot", clip_skip=skip - 1)[1:], atol=1e-5)
    with pytest.raises(ValueError, match=f"clip_skip={layers + 1}, and this text encoder has {layers} layers"):
        model.embed_prompts(["a parrot"], clip_skip=layers + 1)


def test_learned_words_are_diffusers(model):
    width = model.text_encoder.config.hidden_size
    words = {"<cat-toy>": torch.randn(1, width), "badhands": torch.randn(4, width)}
    pipe, model = theirs_of(model), replace(model, embeddings=words)
    for word, vectors in words.items():
        pipe.load_textual_inversion({word: vectors if len(vectors) > 1 else vectors[0]}, token=word)
    prompt, negative = "a <cat-toy>, red on badhands", "badhands, blue"
    found = model.embed_prompts([negative, prompt])
    assert torch.allclose(found, encoded(pipe, prompt, negative), atol=1e-5)
    assert torch.equal(model.embed_prompts([negative, prompt], "plain"), found)
    assert torch.equal(model.embed_prompts(["a (Badhands:1)"]), model.embed_prompts(["a badhands"]))
    assert not torch.allclose(model.embed_prompts(["a (badhands:1.4)"]), model.embed_prompts(["a badhands"]), atol=1e-2)


def test_a_network_takes_text_of_any_length(fresh_model):
    """Keys and values once a text, the maps multiplied in for short texts, and the plain layers say the same."""
    x, t = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.inference_mode():
        for prompt in ("a parrot", "a BREAK b", LONG):
            text = fresh_model.embed_prompts(["", prompt])
            (remembered,) = fresh_model.unet.remember(t, text)
            found = fresh_model.unet(x, t, text, remembered=remembered)
            assert torch.allclose(found, fresh_model.unet(x, t, text), atol=1e-4), prompt


def test_a_graph_is_recorded_for_each_length(fresh_model):
    graphs, network = Graphs(lambda call: (lambda: None, call())), torch.nn.Identity()
    for prompt, count in (("a", 1), ("b", 1), ("a BREAK b", 2), ("c BREAK d", 2), ("c", 2)):
        graphs(network, fresh_model.embed_prompts([prompt]))
        assert len(graphs) == count


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_videos_follow_what_stands_in_every_chunk(fresh_model, guidance):
    common = {"num_inference_steps": 1, "guidance_scale": guidance, "num_frames": 3, "width": 64, "height": 64}
    common |= {"context_length": 2, "context_overlap": 1, "sampler": "ddim", "num_videos_per_prompt": 2}
    prompts = [LONG, LONG + "red", LONG.replace("fox", "(fox:1.5)")]
    made = [sample(fresh_model, SampleRequest(prompt=prompt, **common)) for prompt in prompts]
    first = made[0][1].frames
    assert first.shape == (3, 64, 64, 3)
    assert all((other[1].frames != first).any() for other in made[1:])
