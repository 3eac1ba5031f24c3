"""The tokenizer is transformers' CLIPTokenizer, also for what nobody would type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from animatelcm.data.sprites import SpritePack
from animatelcm.hub import ASSETS
from animatelcm.miniature import build_tokenizer, corpus
from animatelcm.nets import emoji as shapes
from animatelcm.nets import sd15
from animatelcm.tokenizer import BOS, EOS, Tokenizer, read_merges

EMOJI = ASSETS / "emoji" / "model" / "tokenizer"
NASTY = [
    "",
    " ",
    "a parrot on a blue background",
    "A Dog, ÜNÏCODE: 100% !",
    "wow!! what's this? it'll don't we've I'm you'd 'S",
    "line\nbreak\r\n\ttab\u00a0no-break\u2003em\u3000wide\u200bzero",
    "\U0001f99c parrot \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "e\u0301 = \u00e9, \u1e9b\u0323, \ufb01, \u0130stanbul, \u00df, \u03a3\u03a3, \u212b, \uac00\u1100\u1161",
    "日本語のテキスト, العربية, हिन्दी, ไทย, עברית, Ελληνικά",
    f"an {EOS} inside, {BOS}and{EOS}",
    "<|ENDOFTEXT|> <|endoftext |> <| endoftext|>",
    "((a:1.3)) [b] {c} <lora:x:1> \\n \" ' ` ~ @#$%^&*_+-=|;:,./?",
    "\x00\x01\x7f\ufffd\ufeff\U0010ffff",
    "1234567890 3.14 1e-5 ½ ² Ⅷ ٣",
    "word " * 100,
    "supercalifragilisticexpialidocious" * 20,
    "x" * 5000,
]


def theirs_of(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """As pipelines call it."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, max_length=tokenizer.model_max_length, **options).input_ids


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS)


@pytest.fixture(scope="module")
def stable_diffusion(clip, tmp_path_factory) -> Path:
    """The four files of Stable Diffusion's folders, as their authors left them."""
    folder = tmp_path_factory.mktemp("sd15")
    clip.save(folder)
    (folder / "tokenizer.json").unlink()
    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = {"content": BOS, **mark}, {"content": EOS, **mark}
    typed = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False,
        "bos_token": typed | bos,
        "do_lower_case": True,
        "eos_token": typed | eos,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": EOS,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": typed | eos,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    roles = {"bos_token": bos, "eos_token": eos, "pad_token": EOS, "unk_token": eos}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    return folder


@pytest.fixture(scope="module")
def folders(stable_diffusion, clip, tmp_path_factory) -> dict[str, Path]:
    """Folders as they occur, by what is special about each."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("sd2", "saved", "inverted", "spare", "old_inverted")}
    for name in ("sd2", "spare", "old_inverted"):
        for file in stable_diffusion.iterdir():
            (made[name] / file.name).write_bytes(file.read_bytes())
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = made["sd2"] / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
        (made["spare"] / file).unlink()
    (made["old_inverted"] / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 49408, "<style>": 49409}))
    clip.save(made["saved"])
    theirs = CLIPTokenizer.from_pretrained(str(stable_diffusion))
    theirs.add_tokens(["<cat-toy>"])
    theirs.save_pretrained(str(made["inverted"]))
    return {"emoji": EMOJI, "sd15": stable_diffusion, **made}


@pytest.mark.parametrize("name", ["emoji", "sd15", "sd2", "saved", "inverted", "spare", "old_inverted"])
def test_a_folder_is_read_as_transformers_reads_it(name, folders, tmp_path):
    ours = Tokenizer.from_folder(folders[name])
    theirs = CLIPTokenizer.from_pretrained(str(folders[name]), **({"model_max_length": 77} if name == "spare" else {}))
    texts = [*NASTY, "a <cat-toy>on <Cat-Toy> in <style>"]
    expected = theirs_of(theirs, texts)
    assert torch.equal(ours(texts), expected)
    assert ours.model_max_length == theirs.model_max_length
    assert len(ours) == len(theirs)
    for role in ("bos", "eos", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
    # and what is saved is the same again, for both, and for tools that know older files alone
    ours.save(tmp_path / "new")
    again = CLIPTokenizer.from_pretrained(str(tmp_path / "new"))
    assert torch.equal(theirs_of(again, texts), expected)
    assert again.model_max_length == theirs.model_max_length
    assert torch.equal(Tokenizer.from_folder(tmp_path / "new")(texts), expected)
    (tmp_path / "new" / "tokenizer.json").unlink()
    assert torch.equal(theirs_of(CLIPTokenizer.from_pretrained(str(tmp_path / "new")), texts), expected)
    assert torch.equal(Tokenizer.from_folder(tmp_path / "new")(texts), expected)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_is_read_as_transformers_reads_it(text):
    ours, theirs = _emoji()
    assert torch.equal(ours([text]), theirs_of(theirs, [text]))


def _emoji(made: list = []) -> tuple[Tokenizer, CLIPTokenizer]:  # noqa: B006 - read once
    made[:] = made or [Tokenizer.from_folder(EMOJI), CLIPTokenizer.from_pretrained(str(EMOJI))]
    return made[0], made[1]


def test_merges_alone_give_clips_numbers(clip):
    """Those that its users know."""
    assert len(clip) == 49_408
    found = clip(["a photo of a cat"])
    assert found.dtype == torch.int64
    assert found[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert found.shape == (1, 77)


def test_the_miniature_learns_the_words_that_ship():
    learned, shipped = build_tokenizer(corpus(SpritePack()), shapes.VOCABULARY, shapes.TOKENS), _emoji()[0]
    assert len(learned) == len(shipped) == shapes.VOCABULARY
    assert torch.equal(learned(NASTY), shipped(NASTY))


def test_long_texts_are_cut_and_end(clip):
    (found,) = clip(["cat " * 200])
    assert (int(found[0]), int(found[-1])) == (clip.bos_token_id, clip.eos_token_id)
    assert set(found[1:-1].tolist()) == {2368}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "vocab.json").unlink(),
        lambda folder: (folder / "merges.txt").unlink(),
        lambda folder: (folder / "vocab.json").write_text("[]"),
        lambda folder: (folder / "vocab.json").write_text('{"a": 0}'),
        lambda folder: (folder / "merges.txt").write_text("#version\nonly-one\n"),
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"model_max_length": "long"}'),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": 5}'),
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    ],
)
def test_a_damaged_folder_is_named(damage, stable_diffusion, tmp_path):
    for file in stable_diffusion.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*fetch the model again"):
        Tokenizer.from_folder(tmp_path)
