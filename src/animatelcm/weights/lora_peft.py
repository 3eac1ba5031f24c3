"""PEFT's settings of a LoRA, which hold the alphas: in a file's header as diffusers writes it, or in a folder."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from animatelcm.weights.files import read_metadata
from animatelcm.weights.lora_keys import PREFIXES

HEADER = "lora_adapter_metadata"
"""Where diffusers keeps the settings: JSON, "<part>." before each of a part's, or nothing if a file is one part's."""
CONFIG = "adapter_config.json"
"""Where PEFT keeps them: beside a file adapter_model.*."""
MOST_PATTERNS = 10_000
LARGEST = torch.finfo(torch.float32).max

_SPELLING = re.compile(r"(\^?)((?:\.\*)?)((?:[A-Za-z0-9_.-]|\\[.-])*)((?:\.\*)?)\$?")
"""The regular expressions that PEFT writes, and people do: a name, ^ and $, and ".*" before or after it."""


class Pattern(NamedTuple):
    """Which modules an alpha is for, read from a regular expression that is little more than a name.

    PEFT takes any expression, of which some run forever on a name; here a match takes one look at each place that it
    can begin at. An expression fits, as in PEFT, from a name's begin or after one of its dots to the name's end.
    """

    pieces: tuple[str, ...]
    """Between them is one character each, whatever it is: a dot that is not escaped."""
    whole: bool = False
    """Only from a name's begin (^)."""
    before: bool = False
    """After anything (.*)."""
    after: bool = False
    """Before anything (.*)."""

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """What an expression says; None for one that is more than a name."""
        match = _SPELLING.fullmatch(text)
        if match is None or (match[2] and match[4]):
            return None
        literal = match[3].replace("\\.", "\0").replace("\\", "")
        pieces = tuple(piece.replace("\0", ".") for piece in literal.split("."))
        return cls(pieces, bool(match[1]), bool(match[2]), bool(match[4]))

    def fits(self, name: str) -> bool:
        return any(self._fits_at(name, start) for start in self._starts(name))

    def _starts(self, name: str) -> Iterable[int]:
        last = len(name) - len(".".join(self.pieces))
        if last < 0:
            return ()
        if not self.after:
            free = self.before or last == 0 or (not self.whole and name[last - 1] == ".")
            return (last,) if free else ()
        return (0,) if self.whole else (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))

    def _fits_at(self, name: str, start: int) -> bool:
        for piece in self.pieces:
            if not name.startswith(piece, start):
                return False
            start += len(piece) + 1
        return True


class Settings(NamedTuple):
    """What PEFT's LoraConfig says about the alphas of one part."""

    alpha: float | None = None
    patterns: tuple[tuple[Pattern, float], ...] = ()
    """The first that fits a module's name comes before ``alpha``."""
    stabilised: bool = False
    """The scale is alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA)."""

    def alpha_of(self, module: str, rank: int) -> float | None:
        """By which, over ``rank``, the layer of a module path is multiplied; None where the settings do not say."""
        part, _, path = module.partition(".")
        spellings = [path]
        if part == "text_encoder":  # some versions of transformers have the prefix, some have not
            bare = path.removeprefix("text_model.")
            spellings = [bare, f"text_model.{bare}"]
        fitting = (alpha for pattern, alpha in self.patterns if any(map(pattern.fits, spellings)))
        alpha = next(fitting, self.alpha)
        return alpha * math.sqrt(rank) if alpha is not None and self.stabilised else alpha


def read_settings(path: Path) -> dict[str, Settings]:
    """Part -> settings that belong to a LoRA file; they say nothing where it has none.

    Ranks are the tensors', so ``rank_pattern`` is not read. Raises ValueError with the file if its settings are
    damaged, or have a pattern that is more than a name.
    """
    beside, header_text = path.parent / CONFIG, read_metadata(path).get(HEADER, "{}")
    source = CONFIG if path.stem == "adapter_model" and beside.is_file() else HEADER
    try:
        facts = json.loads(beside.read_text("utf-8") if source == CONFIG else header_text)
        apart = any(key.startswith(tuple(f"{part}." for part in PREFIXES)) for key in facts)
        alphas = {part: _alphas(_of_part(facts, part) if apart else facts) for part in PREFIXES}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its {source} is damaged ({error}); fetch it again") from error
    return {
        part: Settings(alpha, _patterns(path, source, named), stabilised)
        for part, (alpha, named, stabilised) in alphas.items()
    }


def header(layers: Mapping[str, tuple[int, float]]) -> str:
    """Settings of (rank, alpha) by module path as diffusers keeps them in a file's header.

    The commonest rank and alpha of a part are its ``r`` and ``lora_alpha``; others are in the patterns, by whole names.
    """
    facts: dict[str, object] = {}
    for part in PREFIXES:
        names = {_target(module): value for module, value in layers.items() if module.startswith(f"{part}.")}
        if names:
            facts |= {f"{part}.{key}": value for key, value in _written(names).items()}
    return json.dumps(facts, indent=2, sort_keys=True)


def _of_part(facts: Mapping[str, object], part: str) -> dict[str, object]:
    return {key.removeprefix(f"{part}."): value for key, value in facts.items() if key.startswith(f"{part}.")}


def _alphas(facts: Mapping[str, object]) -> tuple[float | None, dict[str, float], bool]:
    """The alpha, others by pattern, whether ranks stabilise them."""
    patterns, alpha = facts.get("alpha_pattern") or {}, facts.get("lora_alpha")
    if not isinstance(patterns, dict):
        raise TypeError("alpha_pattern holds no numbers by name")
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"alpha_pattern holds {len(patterns)} patterns, expected at most {MOST_PATTERNS}")
    by_name = {str(pattern): _number(value) for pattern, value in patterns.items()}
    return None if alpha is None else _number(alpha), by_name, bool(facts.get("use_rslora"))


def _patterns(path: Path, source: str, alphas: Mapping[str, float]) -> tuple[tuple[Pattern, float], ...]:
    found = []
    for text, alpha in alphas.items():
        if (pattern := Pattern.parse(text)) is None:
            raise ValueError(
                f"{path}: its {source} has the pattern {text[:80]!r}, expected a module's name with at most one .* "
                "before or after it; write a pattern for each name"
            )
        found.append((pattern, alpha))
    return tuple(found)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{reprlib.repr(value)} is no alpha")
    return float(value)


def _target(module: str) -> str:
    """The end of a module's name in every version of diffusers and transformers."""
    return module.partition(".")[2].removeprefix("text_model.")


def _written(layers: Mapping[str, tuple[int, float]]) -> dict[str, object]:
    ranks = {name: rank for name, (rank, _) in layers.items()}
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, (_, alpha) in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers),
    }
