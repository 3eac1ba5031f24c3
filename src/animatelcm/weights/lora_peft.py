"""PEFT's settings of a LoRA, which hold the alphas: in a file's header as diffusers writes it, or in a folder."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from animatelcm.weights.files import read_metadata
from animatelcm.weights.lora_keys import PREFIXES

HEADER = "lora_adapter_metadata"
"""Where diffusers keeps the settings: JSON, "<part>." before each of a part's, or nothing if a file is one part's."""
CONFIG = "adapter_config.json"
"""Where PEFT keeps them: beside a file adapter_model.*."""


class Settings(NamedTuple):
    """What PEFT's LoraConfig says about the alphas of one part."""

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    """The first that matches a module's name comes before ``alpha``."""
    stabilised: bool = False
    """The scale is alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA)."""

    def alpha_of(self, module: str, rank: int) -> float | None:
        """By which, over ``rank``, the layer of a module path is multiplied; None where the settings do not say."""
        part, _, path = module.partition(".")
        spellings = [path]
        if part == "text_encoder":  # some versions of transformers have the prefix, some have not
            bare = path.removeprefix("text_model.")
            spellings = [bare, f"text_model.{bare}"]
        fitting = (alpha for pattern, alpha in self.patterns if any(map(pattern.match, spellings)))
        alpha = next(fitting, self.alpha)
        return alpha * math.sqrt(rank) if alpha is not None and self.stabilised else alpha


def read_settings(path: Path) -> dict[str, Settings]:
    """Part -> settings that belong to a LoRA file; they say nothing where it has none. Raises ValueError if damaged."""
    beside, header_text = path.parent / CONFIG, read_metadata(path).get(HEADER, "{}")
    source = CONFIG if path.stem == "adapter_model" and beside.is_file() else HEADER
    try:
        facts = json.loads(beside.read_text("utf-8") if source == CONFIG else header_text)
        apart = any(key.startswith(tuple(f"{part}." for part in PREFIXES)) for key in facts)
        return {part: _parsed(_of_part(facts, part) if apart else facts) for part in PREFIXES}
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{path}: its {source} is damaged ({error}); fetch it again") from error


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


def _parsed(facts: Mapping[str, object]) -> Settings:
    patterns = (facts.get("alpha_pattern") or {}).items()
    alpha = facts.get("lora_alpha")
    return Settings(
        None if alpha is None else _number(alpha),
        tuple((re.compile(rf"(.*\.)?({pattern})$"), _number(value)) for pattern, value in patterns),
        bool(facts.get("use_rslora")),
    )


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no alpha")
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
