"""CLIP's tokenizer: lower-cased text in byte pairs, between a token that starts and one that ends it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from animatelcm.building import read_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
"""Tokens of a text where a folder does not say: Stable Diffusion's."""
WORD_END = "</w>"
MOST = 65_536
ROLES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
"""Tokens with a meaning, by their names in settings files, and CLIP's. Where files disagree on how one is found in a
text, the last has it."""
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
Pair = tuple[str, str]


class Tokenizer:
    """Texts to numbers, each of ``model_max_length``: longer ones are cut, shorter ones padded."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[Pair],
        length: int,
        *,
        roles: Mapping[str, AddedToken] | None = None,
        added: Iterable[AddedToken] = (),
    ) -> None:
        """Byte pairs, the earliest first. ``roles`` are tokens that stand in for CLIP's, by ``ROLES``; they and those
        that were ``added`` are found in a text as they are, and have the next free numbers where they are new."""
        named = {name: AddedToken(text, special=True) for name, text in ROLES.items()} | dict(roles or {})
        self._tokens = encoder(dict(vocabulary), merges)
        self._tokens.add_tokens([*added])
        here = {token.content for token in self._tokens.get_added_tokens_decoder().values()}
        self._tokens.add_tokens([token for token in named.values() if token.content not in here])
        self._roles = {name: token.content for name, token in named.items()}
        bos, eos, pad = (self._roles[name] for name in ("bos_token", "eos_token", "pad_token"))
        self.model_max_length = length
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(self._tokens.token_to_id, (bos, eos, pad))
        ends = (eos, self.eos_token_id), (bos, self.bos_token_id)
        self._tokens.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
        self._tokens.enable_truncation(length)
        self._tokens.enable_padding(length=length, pad_id=self.pad_token_id, pad_token=pad)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> int64 (B, ``model_max_length``)."""
        return torch.tensor([found.ids for found in self._tokens.encode_batch(list(texts))], dtype=torch.long)

    def spelled(self, text: str) -> list[int]:
        """All tokens of a text, however many, without those that start and end it."""
        whole = self._tokens.encode(text, add_special_tokens=False)
        return [
            number
            for part in (whole, *whole.overflowing)
            for number, told in zip(part.ids, part.attention_mask, strict=True)
            if told
        ]

    def ended(self, numbers: Sequence[int]) -> list[int]:
        """``model_max_length`` - 2 tokens at most, between those that start and end a text, padded as texts are."""
        found = [self.bos_token_id, *numbers, self.eos_token_id]
        return found + [self.pad_token_id] * (self.model_max_length - len(found))

    def __len__(self) -> int:
        """Tokens in the vocabulary."""
        return self._tokens.get_vocab_size()

    @classmethod
    def from_merges(cls, merges: Sequence[Pair], length: int) -> Tokenizer:
        """From merges alone, from which CLIP's vocabulary follows.

        Its order: 256 bytes, 256 bytes that end a word, merges, start and end of text.
        """
        letters = _byte_letters()
        words = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges)]
        return cls({word: i for i, word in enumerate([*words, BOS, EOS])}, merges, length)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json, or vocab.json with merges.txt, and the settings beside them.

        Raises ValueError naming the folder where they are missing or damaged.
        """
        try:
            vocabulary, merges, added = _read_model(folder)
            said = _read_if_there(folder / "tokenizer_config.json")
            if "added_tokens_decoder" in said:
                by_number = sorted(said["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
                added = [_token(token) for _, token in by_number]
            else:
                said |= _read_if_there(folder / "special_tokens_map.json")
            known = {token.content: token for token in added}
            roles = {name: _token(said.get(name) or text) for name, text in ROLES.items()}
            roles = {name: known.get(token.content, token) for name, token in roles.items()}
            return cls(vocabulary, merges, _length(said), roles=roles, added=added)
        except Exception as error:  # what the library raises has no class of its own
            raise ValueError(f"{folder} holds no tokenizer of CLIP's ({error}); fetch the model again") from error

    def save(self, folder: Path) -> None:
        """Write the files that transformers' CLIPTokenizer reads, the older ones too."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = json.loads(self._tokens.to_str())
        added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in whole["added_tokens"]}
        config = {
            **self._roles,
            "added_tokens_decoder": added,
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        lines = ["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"])]
        files = {
            "tokenizer.json": whole,
            "tokenizer_config.json": config,
            "special_tokens_map.json": self._roles,
            "vocab.json": whole["model"]["vocab"],
        }
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def encoder(vocabulary: dict[str, int], merges: Sequence[Pair]) -> tokenizers.Tokenizer:
    """Byte pairs behind CLIP's preparation of text: NFC, one space for any, lower case, then words."""
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list(merges),
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            unk_token=EOS,
        )
    )
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    made.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    return made


def read_merges(path: Path) -> list[Pair]:
    """Byte pairs from merges.txt, whose first line tells its version."""
    pairs = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return [(first, second) for first, second in pairs]


def _read_model(folder: Path) -> tuple[dict[str, int], list[Pair], list[AddedToken]]:
    """Vocabulary, merges, tokens that were added."""
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]
        added = [{key: value for key, value in token.items() if key != "id"} for token in whole["added_tokens"]]
        return whole["model"]["vocab"], [tuple(pair) for pair in merges], [_token(token) for token in added]
    extra = _read_if_there(folder / "added_tokens.json")
    added = [AddedToken(text, normalized=True) for text, _ in sorted(extra.items(), key=lambda item: item[1])]
    return read_json(folder / "vocab.json"), read_merges(folder / "merges.txt"), added


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token(said: str | Mapping[str, Any]) -> AddedToken:
    """A token that is found in texts as it is, from a settings file."""
    if isinstance(said, str):
        return AddedToken(said, special=True)
    facts = {key: value for key, value in said.items() if key != "__type"}
    return AddedToken(**{"special": True, **facts})


def _length(said: Mapping[str, Any]) -> int:
    """Some files say 10^30 where they mean that they do not know."""
    length = said.get("model_max_length", LENGTH)
    if not isinstance(length, int | float) or length < 2:
        raise ValueError(f"model_max_length={length!r}")
    return LENGTH if length > MOST else int(length)


def _byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2), in its vocabulary's order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    hidden = 256 - len(shown)  # bytes without a visible character stand after all others
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(hidden)]
