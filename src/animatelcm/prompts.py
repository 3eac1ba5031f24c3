"""What the marks in a prompt mean: weights, chunks, words for learned vectors. Text alone, which ``model`` encodes.

The marks are those of AUTOMATIC1111's web UI (its wiki, "Features": attention/emphasis, BREAK). ComfyUI reads the round
brackets alike, and square ones as letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

Syntax = Literal["a1111", "plain"]
"""How a prompt is read: with A1111's marks, or letter by letter."""
FACTORS = {"(": 1.1, "[": 1 / 1.1}
MOST = 10.0
"""The largest weight; what is larger was meant as text."""
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MARKS = re.compile(
    rf"""\\(?P<letter>[()\[\]\\]) | :\s*(?P<weight>{_NUMBER})\s*\) | (?P<open>[(\[]) | (?P<close>[)\]])
    | (?P<end>\bBREAK\b) | (?P<text>(?:(?!\bBREAK\b)[^\\()\[\]:])+ | .)""",
    re.VERBOSE | re.DOTALL,
)
_LORA = re.compile(r"<(?:lora|lyco):([^<>:]+)(?::([^<>:]*))?[^<>]*>", re.IGNORECASE)
_EDITING = re.compile(rf"(?<!\\)\[[^\[\]]*(?::\s*{_NUMBER}\s*|\|[^\[\]]*)\]")
_NAMED = re.compile(r"\bembedding:(\S+)", re.IGNORECASE)


class Piece(NamedTuple):
    """A part of a prompt, and how much of it there is to be."""

    text: str
    weight: float = 1.0


def sections(prompt: str, syntax: Syntax = "a1111") -> list[list[Piece]]:
    """What stands between the BREAKs of a prompt, each in pieces of one weight; a "plain" prompt is one piece.

    (x) weighs 1.1, [x] 1 / 1.1 and (x:1.3) what it says. Brackets nest, one that nobody closes reaches to the end, and
    behind a backslash they are letters. Raises ValueError for weights beyond ``MOST``, and for marks of A1111's that do
    nothing here: a LoRA's name, and prompts that change on the way ([a:b:0.5], [a|b]).
    """
    if syntax == "plain":
        return [[Piece(prompt)]]
    _check(prompt)
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    ends = [0]
    for found in _MARKS.finditer(prompt):
        kind, text = found.lastgroup, found[found.lastgroup or 0]
        bracket = {")": "(", "]": "["}.get(text, "(")
        if kind == "open":
            opened[text].append(len(pieces))
        elif kind == "end":
            ends.append(len(pieces))
        elif kind in ("weight", "close") and opened[bracket]:
            _weigh(pieces, opened[bracket].pop(), float(text) if kind == "weight" else FACTORS[bracket])
        else:
            pieces.append(Piece(text if kind == "letter" else found[0]))
    for bracket, places in opened.items():
        for place in places:
            _weigh(pieces, place, FACTORS[bracket])
    if odd := [piece for piece in pieces if not abs(piece.weight) <= MOST]:  # or is NaN
        raise ValueError(
            f"{odd[0].text[:40]!r} weighs {odd[0].weight:g} in a prompt; choose {-MOST:g} to {MOST:g}, or write "
            "\\( and \\) for brackets that are letters"
        )
    found = [_joined(pieces[begin:end]) for begin, end in pairwise([*ends, len(pieces)])]
    return found[:-1] if len(found) > 1 and not "".join(piece.text for piece in found[-1]).strip() else found


def chunks(
    parts: Sequence[Sequence[Piece]], spell: Callable[[str], Sequence[int]], words: Mapping[str, range], room: int
) -> list[list[tuple[int, float]]]:
    """Numbers of tokens with their weights, ``room`` at most in a chunk; a section begins a chunk of its own.

    ``spell``: the tokens of a text. ``words``: with the numbers of what stands for each, which one chunk
    holds; ComfyUI's "embedding:WORD" is WORD. Raises ValueError where that is none of them.
    """
    made: list[list[tuple[int, float]]] = []
    for section in parts:
        made.append([])
        for text, weight in section:
            for numbers in _numbers(text, spell, words):
                if len(made[-1]) + len(numbers) > room:
                    made.append([])
                made[-1] += [(number, weight) for number in numbers]
    return made


def _numbers(text: str, spell: Callable[[str], Sequence[int]], words: Mapping[str, range]) -> list[Sequence[int]]:
    """A text's tokens, each in a list of its own; those of a learned word are together."""
    found: list[Sequence[int]] = []
    for part in _split(text, words):
        if isinstance(part, range):
            found.append(part)
        elif unknown := _NAMED.search(part):
            raise ValueError(f"{unknown[0]!r} in a prompt, and no such word is loaded; give --embedding FILE")
        else:
            found += [[number] for number in spell(part)]
    return found


def _split(text: str, words: Mapping[str, range]) -> Iterator[str | range]:
    """Words are found whatever their case, the longest first, and not within others; the text between them."""
    order, place = sorted(words, key=len, reverse=True), 0
    if order:
        for hit in re.finditer("|".join(map(_whole, order)), text, re.IGNORECASE):
            yield text[place : hit.start()]
            yield words[order[(hit.lastindex or 0) - 1]]
            place = hit.end()
    yield text[place:]


def _whole(word: str) -> str:
    before, after = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    return f"({before}(?:embedding:)?{re.escape(word)}{after})"


def _weigh(pieces: list[Piece], begin: int, factor: float) -> None:
    pieces[begin:] = [Piece(text, weight * factor) for text, weight in pieces[begin:]]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one weight are one text, as words are that a mark goes through."""
    return [Piece("".join(p.text for p in same), weight) for weight, same in groupby(pieces, lambda p: p.weight)]


def _check(prompt: str) -> None:
    """Raises ValueError for marks that load or change something in A1111."""
    if lora := _LORA.search(prompt):
        name = f"{lora[1]}:{lora[2]}" if lora[2] else lora[1]
        raise ValueError(f"{lora[0]} in a prompt loads nothing here; take it out, and give --lora {name}")
    if editing := _EDITING.search(prompt):
        raise ValueError(
            f"{editing[0][:60]} in a prompt changes it on the way, which is not known here; choose one of its texts, "
            "or write \\[ and \\] for brackets that are letters"
        )
