"""UCF-101 as the papers use it: real clips drawn by chance, and prompts that ask for as many videos of every class.

Zero-shot text to video (Wang et al. 2024, section 5.1): 24 videos of 16 frames at 512x512 for each of 101 classes, by a
brief caption of each; FVD between 2,048 of these and 2,048 real ones. The papers' captions are not published: these
here are our own, so CLIPSIM and FVD lie near theirs only as far as captions do. Which frames of the real videos they
took is not said either: here 16 neighbours (``stride`` 1, 25 frames a second) from a random one on.

Draws are addressed by seed and file name: a draw of fewer clips begins one of more, and a file that comes or goes
shifts no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from animatelcm import video
from animatelcm.evaluate.folders import chosen
from animatelcm.evaluate.report import facts_hash, write_json
from animatelcm.hub import ASSETS
from animatelcm.rng import generator

CAPTIONS: dict[str, str] = json.loads((ASSETS / "eval" / "ucf101.json").read_text(encoding="utf-8"))
"""Class -> caption, in the order of the official ``classInd.txt``."""
PER_CLASS = 24
WHOLE, PAPERS_DRAW = 13_320, 2048
"""Videos that UCF-101 has, and how many of them the papers draw."""
SETTINGS = {"num_frames": 16, "height": 512, "width": 512, "prompt_syntax": "plain"}
SPLITS = tuple(f"{part}{number}" for part in ("train", "test") for number in (1, 2, 3))
_FILE = re.compile(r"v_\w+_g\d\d_c\d\d\.avi")
_LAYOUT = "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi and so on"


class Draw(NamedTuple):
    """One real clip: a file relative to the classes' folder, with forward slashes, and its first frame."""

    file: str
    start: int


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Real clips, and all that says how they were drawn."""

    clips: tuple[Draw, ...]
    frames: int
    stride: int
    """A clip is every ``stride``-th frame of its video."""
    seed: int
    split: str
    """The official list that was drawn from, "train1" to "test3"; "": all videos."""
    videos: int
    """How many these are."""
    skipped: dict[str, str]
    """File -> why it was passed over: too short, or unreadable."""

    def remark(self) -> str:
        """One sentence where figures of these clips do not compare with the papers'; else nothing."""
        if (len(self.clips), self.frames, self.videos) == (PAPERS_DRAW, SETTINGS["num_frames"], WHOLE):
            return ""
        return (
            f"{len(self.clips):,} clips of {self.frames} frames from {self.videos:,} videos, where the papers draw "
            f"{PAPERS_DRAW:,} of {SETTINGS['num_frames']} from {WHOLE:,}: the figure does not compare with theirs"
        )

    def facts(self) -> dict[str, Any]:
        """What a figure's protocol hash is to know of its real clips."""
        said = {key: value for key, value in asdict(self).items() if key not in ("clips", "skipped")}
        return {"data": "UCF-101", **said, "n": len(self.clips), "clips": facts_hash({"clips": self.clips})}


def videos(folder: Path, split: str = "") -> list[str]:
    """The videos of a UCF-101 folder, or of the folder around it, sorted: all, or those of an official list.

    Raises ValueError where the layout is another one, or a list or a listed file is missing.
    """
    root = root_of(folder)
    found = [
        f"{name}/{path.name}" for name in CAPTIONS for path in root.glob(f"{name}/*") if _FILE.fullmatch(path.name)
    ]
    if not found:
        raise ValueError(f"the class folders in {root} hold no videos; {_LAYOUT} is needed")
    if not split:
        return sorted(found)
    listed = _listed(folder, root, split)
    if missing := sorted(listed - set(found)):
        raise ValueError(
            f"{len(missing)} of {len(listed)} videos of the list {split} are not in {root}, e.g. {missing[0]}; "
            "unpack UCF101.rar again, or draw from all videos"
        )
    return sorted(listed)


def root_of(folder: Path) -> Path:
    """The folder that holds the classes'."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give that of UCF-101, with {_LAYOUT}")
    for root in (folder, folder / "UCF-101"):
        if any((root / name).is_dir() for name in CAPTIONS):
            return root
    seen = ", ".join(sorted(path.name for path in folder.iterdir())[:3]) or "nothing"
    raise ValueError(f"{folder} holds none of the 101 classes of UCF-101 but {seen}; give a folder with {_LAYOUT}")


def _listed(folder: Path, root: Path, split: str) -> set[str]:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of UCF-101's; choose {', '.join(SPLITS)}, or none for all videos")
    name = f"ucfTrainTestlist/{split[:-1]}list0{split[-1]}.txt"
    for place in (folder, root, root.parent):
        if (place / name).is_file():
            lines = (place / name).read_text(encoding="utf-8").splitlines()
            return {line.split()[0] for line in lines if line.strip()}  # a label may follow
    raise ValueError(f"there is no {name} beside {root}; unpack the official lists there, or draw from all videos")


def draws(
    folder: Path, n: int = PAPERS_DRAW, frames: int = 16, seed: int = 0, *, stride: int = 1, split: str = ""
) -> Draws:
    """``n`` clips of as many videos, each beginning at a random frame; fewer where there are not so many videos.

    Videos that cannot be read or are too short are passed over, and named. Raises ValueError where none is left.
    """
    if min(n, frames, stride) < 1:
        raise ValueError(f"n={n}, frames={frames}, stride={stride}: 1 at least is needed of each")
    names, root = videos(folder, split), root_of(folder)
    clips: list[Draw] = []
    skipped: dict[str, str] = {}
    for file in chosen(names, len(names), seed):
        if len(clips) == n:
            break
        try:
            clips.append(_draw(root, file, (frames - 1) * stride + 1, seed))
        except ValueError as error:
            skipped[file] = str(error.__cause__ or error)
    if not clips:
        file, reason = next(iter(skipped.items()))
        raise ValueError(f"none of the {len(names)} videos in {root} can be used, e.g. {file}: {reason}")
    return Draws(
        clips=tuple(clips), frames=frames, stride=stride, seed=seed, split=split, videos=len(names), skipped=skipped
    )


def _draw(root: Path, file: str, span: int, seed: int) -> Draw:
    count = video.probe(root / file).num_frames
    if count < span:
        raise ValueError(f"{count} frames, {span} are needed")
    source = generator(seed, 0, 0, f"ucf101-start/{file}")
    return Draw(file, int(torch.randint(count - span + 1, (), generator=source)))


def clips(folder: Path, drawn: Draws) -> Iterator[np.ndarray]:
    """The drawn clips in their order, uint8 (frames, H, W, 3), 240 x 320 in the official files.

    Raises ValueError naming a file that ends too early or fails to decode: remove it, and draw again.
    """
    root = root_of(folder)
    for file, start in drawn.clips:
        yield video.read(root / file, num_frames=drawn.frames, stride=drawn.stride, start=start).frames


def write_draws(drawn: Draws, path: Path) -> None:
    """As JSON, whole or not at all."""
    write_json(asdict(drawn), path)


def read_draws(path: Path) -> Draws:
    """What ``write_draws`` wrote. Raises ValueError naming a file that holds no draws."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Draws(**{**fields, "clips": tuple(Draw(*clip) for clip in fields["clips"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no draws of UCF-101 ({error}); draw again") from error


def prompts(
    n: int = PER_CLASS * len(CAPTIONS), seed: int = 0, settings: Mapping[str, Any] = SETTINGS
) -> list[dict[str, Any]]:
    """Rows for ``animatelcm batch`` (see ``rows``): one video of every class, then the next of each, and so on.

    Any ``n`` so has the classes as evenly as can be. Row i has the seed ``seed + i``.
    """
    if n < 1:
        raise ValueError(f"n={n} videos: ask for 1 at least; the papers make {PER_CLASS * len(CAPTIONS):,}")
    names, rows = list(CAPTIONS), []
    for i in range(n):
        turn, which = divmod(i, len(names))
        file = f"{names[which]}-{turn:02}.mp4"
        rows.append({"file": file, "prompt": CAPTIONS[names[which]], "seed": seed + i, **settings})
    return rows
