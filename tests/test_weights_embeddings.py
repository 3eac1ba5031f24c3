"""Textual inversions as their authors write them: read, refused, named, and loaded into a model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from animatelcm.assembly import load_sum
from animatelcm.batch import about
from animatelcm.inspection import describe
from animatelcm.model_source import ModelSource
from animatelcm.weights.embeddings import read_embedding
from animatelcm.weights.files import TensorInfo
from animatelcm.weights.identify import identify

VECTORS = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))


def a1111(vectors: torch.Tensor) -> dict:
    """What its "Train" tab writes."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(vectors)},
        "name": "my-style",
        "step": 4000,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": None,
    }


def write(content: dict, path):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


FILES = {
    "a1111.pt": (a1111(VECTORS), "", VECTORS),
    "a1111.safetensors": ({"emb_params": VECTORS}, "", VECTORS),
    "half.safetensors": ({"emb_params": VECTORS.half()}, "", VECTORS.half().float()),
    "learned_embeds.bin": ({"<cat-toy>": VECTORS[0].clone()}, "<cat-toy>", VECTORS[:1]),
    "learned_embeds.safetensors": ({"<cat-toy>": VECTORS[0].clone()}, "<cat-toy>", VECTORS[:1]),
    "several.safetensors": ({"<cat-toy>": VECTORS}, "<cat-toy>", VECTORS),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_they_are_written(name, legacy, tmp_path):
    content, word, vectors = FILES[name]
    path = tmp_path / name
    if legacy and path.suffix != ".safetensors":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        write(content, path)
    found_word, found = read_embedding(path, 768, 75)
    assert found_word == word
    assert torch.equal(found, vectors)
    count = f"{len(vectors)} vector{'s' * (len(vectors) > 1)}"
    kind = (
        f"Stable Diffusion 1 textual inversion ({count}, {vectors.numel():,} parameters, goes in as --embedding FILE)"
    )
    assert describe(path)["kind"] == kind


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"emb_params": torch.zeros(2, 1024)},
            "is a textual inversion for Stable Diffusion 2 .1024 numbers.* takes 768",
        ),
        ({"clip_g": torch.zeros(2, 1280), "clip_l": torch.zeros(2, 768)}, "for Stable Diffusion XL .1280 numbers"),
        ({"clip_g": torch.zeros(2, 1280)}, "for Stable Diffusion XL .1280 numbers"),
        ({"<a>": torch.zeros(5)}, "for another model .5 numbers"),
        ({"emb_params": torch.zeros(76, 768)}, "has 76 vectors, and a chunk of a prompt has room for 1 to 75"),
        ({"emb_params": torch.zeros(0, 768)}, "has 0 vectors"),
        ({"emb_params": torch.full((1, 768), torch.nan)}, "emb_params holds numbers that are not finite"),
        ({"a.weight": torch.zeros(4, 768), "b.weight": torch.zeros(4, 768)}, "is no textual inversion"),
        ({"a.weight": torch.zeros(4, 3, 768)}, "is no textual inversion"),
        ({"a.weight": torch.zeros(())}, "is no textual inversion"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(content, said, tmp_path):
    path = write(content, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? .*{said}"):
        read_embedding(path, 768, 75)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    """Also the first ones, whose tensors are in a ParameterDict."""
    path = tmp_path / "old.pt"
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": torch.zeros(1, 768)})}, path)
    with pytest.raises(ValueError, match=r"old\.pt .*ParameterDict.*look for a \.safetensors release"):
        read_embedding(path, 768, 75)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"emb_params": (1, 1024)}, "Stable Diffusion 2 textual inversion (1 vector, 1,024 parameters)"),
        (
            {"clip_l": (2, 768), "clip_g": (2, 1280)},
            "Stable Diffusion XL textual inversion (2 vectors, 4,096 parameters)",
        ),
        ({"<small>": (4, 96)}, "Weights of an unknown kind (0 parameters)"),
        ({"weight": (4, 768)}, "Weights of an unknown kind (0 parameters)"),
        ({"a": (768,), "b": (768,)}, "Weights of an unknown kind (0 parameters)"),
    ],
)
def test_they_are_known_by_names_and_shapes(shapes, text):
    assert str(identify({key: TensorInfo(shape, "F32") for key, shape in shapes.items()})) == text


def test_a_model_is_loaded_with_words(fresh_folder, fresh_model, tmp_path):
    width = fresh_model.text_encoder.config.hidden_size
    torch.manual_seed(0)
    vectors = {name: torch.randn(2, width) for name in ("style", "named", "own")}
    stem = write({"emb_params": vectors["style"]}, tmp_path / "my style.safetensors")
    other = write(a1111(vectors["named"]), tmp_path / "file.pt")
    (tmp_path / "concept").mkdir()
    write({"<own>": vectors["own"]}, tmp_path / "concept" / "learned_embeds.bin")
    given = (str(stem), f"other={other}", str(tmp_path / "concept"))
    model = load_sum(ModelSource(model=str(fresh_folder), embedding=given))
    expected = dict(zip(("my style", "other", "<own>"), vectors.values(), strict=True))
    assert model.embeddings.keys() == expected.keys()
    assert all(torch.equal(value, expected[word]) for word, value in model.embeddings.items())
    texts = ["a (my style:1.2) with <own>", "other"]
    found = model.embed_prompts(texts)
    assert torch.equal(found, replace(fresh_model, embeddings=expected).embed_prompts(texts))
    assert not torch.equal(found, fresh_model.embed_prompts(texts))
    # what a batch has made with other words is not what it would make now
    renamed = replace(model, embeddings={word + "x": value for word, value in expected.items()})
    assert len({about(each).fingerprint for each in (model, renamed, fresh_model)}) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("{}/a.safetensors", "A={}/a.safetensors"), "the word 'A' has a textual inversion; give WORD=FILE"),
        (("{}",), "learned_embeds.safetensors"),
        (("{}/none.pt",), "textual inversion '.*none.pt': there is no such file"),
        (("x={}/none.pt",), "textual inversion '.*none.pt': there is no such file"),
        (("{}/wide.safetensors",), "a textual inversion for Stable Diffusion 1"),
    ],
)
def test_what_cannot_be_loaded_is_named(given, said, fresh_folder, fresh_model, tmp_path):
    write({"emb_params": torch.zeros(1, fresh_model.text_encoder.config.hidden_size)}, tmp_path / "a.safetensors")
    write({"emb_params": VECTORS}, tmp_path / "wide.safetensors")
    places = tuple(text.format(tmp_path) for text in given)
    with pytest.raises(ValueError, match=said):
        load_sum(ModelSource(model=str(fresh_folder), embedding=places))


def test_places_may_have_the_sign_of_a_name():
    places = ("a.pt", "word=a.pt", "https://hf.co/a/b/a.pt?x=1", "some/a=b.pt", " my word =/a=b.pt")
    found = ModelSource(embedding=places).embeddings()
    assert found == [("", places[0]), ("word", "a.pt"), ("", places[2]), ("", places[3]), ("my word", "/a=b.pt")]
