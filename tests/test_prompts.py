"""Marks in prompts: what they weigh, where chunks end, which words are learned ones, what is refused."""

from __future__ import annotations

import re
import shlex
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from animatelcm.model_source import ModelSource
from animatelcm.prompts import Piece, chunks, sections
from animatelcm.provenance import command
from animatelcm.request import SampleRequest

LETTERS = "ab ,.\n'é日"


def spell(text: str) -> list[int]:
    """A token a letter."""
    return [ord(letter) for letter in text if not letter.isspace()]


def numbers(prompt: str, room: int, **words: range) -> list[list[int]]:
    return [[number for number, _ in part] for part in chunks(sections(prompt), spell, words, room)]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a parrot", [("a parrot", 1)]),
        ("a (parrot)", [("a ", 1), ("parrot", 1.1)]),
        ("((parrot))", [("parrot", 1.21)]),
        ("[parrot]", [("parrot", 1 / 1.1)]),
        ("(parrot:1.5) on blue", [("parrot", 1.5), (" on blue", 1)]),
        ("(parrot : 1.5 )", [("parrot ", 1.5)]),
        ("(parrot:.5)", [("parrot", 0.5)]),
        ("(parrot:-1)", [("parrot", -1)]),
        ("(a (red:2) parrot:0.5)", [("a ", 0.5), ("red", 1), (" parrot", 0.5)]),
        ("([parrot])", [("parrot", 1)]),
        (r"parrot \(bird\) \[x\] \\", [(r"parrot (bird) [x] " + "\\", 1)]),
        (r"(parrot \(bird\):1.2)", [("parrot (bird)", 1.2)]),
        ("a:b :) C:\\dir ratio 16:9", [("a:b :) C:\\dir ratio 16:9", 1)]),
        ("parrot:1.5)", [("parrot:1.5)", 1)]),
        ("a ] b )", [("a ] b )", 1)]),
        ("a (red parrot", [("a ", 1), ("red parrot", 1.1)]),
        ("un(believ)able", [("un", 1), ("believ", 1.1), ("able", 1)]),
        ("()", []),
        ("", []),
    ],
)
def test_weights(prompt, pieces):
    (found,) = sections(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])
    assert sections(prompt, "plain") == [[Piece(prompt)]]


TREES = st.recursive(
    st.text(LETTERS + "()[]\\", max_size=5),
    lambda parts: st.tuples(st.sampled_from(["()", "[]", 0.3, 1.3, 1.7]), st.lists(parts, max_size=3)),
    max_leaves=8,
)


def written(tree) -> str:
    if isinstance(tree, str):
        return re.sub(r"([()\[\]\\])", r"\\\1", tree)
    mark, parts = tree
    inner = "".join(map(written, parts))
    return f"{mark[0]}{inner}{mark[1]}" if isinstance(mark, str) else f"({inner}:{mark})"


def letters(tree, weight: float = 1.0) -> list[tuple[str, float]]:
    """Each letter of a tree with the product of what is around it."""
    if isinstance(tree, str):
        return [(letter, weight) for letter in tree]
    mark, parts = tree
    factor = {"()": 1.1, "[]": 1 / 1.1}.get(mark, mark)
    return [found for part in parts for found in letters(part, weight * factor)]


@given(trees=st.lists(TREES, max_size=3))
def test_any_tree_is_read_as_it_was_written(trees):
    expected = [found for tree in trees for found in letters(tree)]
    if any(abs(weight) > 10 for _, weight in expected):
        return
    (pieces,) = sections("".join(map(written, trees)))
    found = [(letter, piece.weight) for piece in pieces for letter in piece.text]
    assert [letter for letter, _ in found] == [letter for letter, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@given(text=st.text(LETTERS + ':<>{}|"0123456789AKREB!#', max_size=40))
def test_a_text_without_marks_is_one_piece_as_it_is(text):
    if "BREAK" not in text:
        assert sections(text) == sections(text, "plain") or not text


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a BREAK b", ["a ", " b"]),
        ("a\nBREAK, b BREAK", ["a\n", ", b "]),
        ("BREAK b", ["", " b"]),
        ("a BREAK BREAK b", ["a ", " ", " b"]),
        ("(a BREAK b:1.5)", ["a ", " b"]),
        ("BREAKFAST, a break", ["BREAKFAST, a break"]),
        ("BREAK", [""]),
    ],
)
def test_break_ends_a_section(prompt, texts):
    found = sections(prompt)
    assert ["".join(piece.text for piece in pieces) for pieces in found] == texts
    weights = {piece.weight for pieces in found for piece in pieces}
    assert weights <= ({1.5} if ":" in prompt else {1.0})
    assert sections(prompt, "plain") == [[Piece(prompt)]]


@given(text=st.text("abc ", max_size=60), room=st.integers(1, 9))
def test_chunks_are_full_but_the_last_and_hold_everything_in_order(text, room):
    found = numbers(text, room)
    assert [number for part in found for number in part] == spell(text)
    assert len(found) == max(1, ceil(len(spell(text)) / room))
    assert all(len(part) == room for part in found[:-1])


def test_a_break_leaves_the_rest_of_its_chunk_empty():
    assert [len(part) for part in numbers("abcde BREAK fg BREAK BREAK h", 4)] == [4, 1, 2, 0, 1]
    assert [len(part) for part in numbers("abcd BREAK e", 4)] == [4, 1]


def test_learned_words_are_found_whole_and_stay_in_one_chunk():
    words = {"cat": range(900, 903), "bad-cat": range(910, 911), "<x>": range(920, 922)}
    (found,) = numbers("a Cat,bad-cat <x>s embedding:cat", 99, **words)
    assert found == [ord("a"), 900, 901, 902, ord(","), 910, 920, 921, ord("s"), 900, 901, 902]
    (found,) = numbers("cats concat", 99, **words)
    assert found == spell("catsconcat")
    assert numbers("abcCAT d CAT", 4, cat=range(900, 903)) == [spell("abcC")[:4], spell("ATd"), [900, 901, 902]]
    assert numbers("ab cat d", 4, cat=range(900, 903)) == [spell("ab"), [900, 901, 902, ord("d")]]
    weighted = chunks(sections("a (cat:1.5)"), spell, words, 9)
    assert weighted == [[(ord("a"), 1.0), (900, 1.5), (901, 1.5), (902, 1.5)]]
    # letters that are one whatever their case, though no lower one makes them so
    assert numbers("\u017ftyle", 9, style=range(900, 901)) == [[900]]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a parrot <lora:twemoji:0.8>", "<lora:twemoji:0.8> in a prompt loads nothing .*give --lora twemoji:0.8$"),
        ("<LoRA:my style> a", "give --lora my style$"),
        ("<lora:a:0.8:0.5:lbw=x>", "give --lora a:0.8$"),
        ("a [cat:dog:0.5]", r"\[cat:dog:0.5\] in a prompt changes it on the way"),
        ("a [cat:10]", "choose one of its texts"),
        ("a [cat|dog]", r"\[cat\|dog\] in a prompt"),
        ("a parrot (born:1985)", "'born' weighs 1985 in a prompt; choose -10 to 10"),
        ("(((a:3):3):3)", "weighs 27"),
        (f"((a:0):{'9' * 400})", "'a' weighs nan"),
    ],
)
def test_marks_that_do_nothing_here_are_refused_before_anything_is_loaded(prompt, said):
    for fields in ({"prompt": prompt}, {"prompt": "a", "negative_prompt": prompt}):
        with pytest.raises(ValueError, match=said):
            SampleRequest(**fields)
        SampleRequest(**fields, prompt_syntax="plain")


def test_a_word_that_is_not_loaded_is_named():
    with pytest.raises(ValueError, match=r"'embedding:dog' .*give --embedding FILE"):
        numbers("a embedding:dog", 9, cat=range(900, 901))


def test_how_a_prompt_was_read_is_in_the_command():
    full = {"num_inference_steps": 4, "guidance_scale": 1.0, "num_frames": 1, "width": 64, "height": 64}
    source = ModelSource(embedding=("a.pt", "cat=b c.pt"))
    words = shlex.split(command(SampleRequest(prompt="a", prompt_syntax="plain", clip_skip=2, **full), source))
    for flag, value in (("--prompt-syntax", "plain"), ("--clip-skip", "2"), ("--embedding", "a.pt")):
        assert words[words.index(flag) + 1] == value
    assert "cat=b c.pt" in words
    said = command(SampleRequest(prompt="a", **full), ModelSource())
    assert not any(flag in said for flag in ("--prompt-syntax", "--clip-skip", "--embedding"))


def test_other_ways_to_read_are_refused():
    with pytest.raises(ValueError, match="prompt_syntax='comfy' is not one of a1111, plain"):
        SampleRequest(prompt="a", prompt_syntax="comfy")
    with pytest.raises(ValueError, match="clip_skip=0 is out of range"):
        SampleRequest(prompt="a", clip_skip=0)
