"""The verbs of ``eval`` that measure videos as papers do: their flags are the fields of dataclasses; no logic here."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from animatelcm.model_source import ModelSource, Precision
from animatelcm.terminal import bars, load, say, told

if TYPE_CHECKING:
    from animatelcm.evaluate.i3d import Detector
    from animatelcm.evaluate.score import Scored


@dataclass(frozen=True, kw_only=True)
class I3dSource:
    """Which I3D."""

    weights: str
    """I3D for Kinetics-400: i3d_torchscript.pt, tensors by name (i3d_pretrained_400.pt, rgb_imagenet.pt), or an http(s)
    address."""
    sha256: str = ""
    """Of that file, for an address and for TorchScript, which is a program: sha256sum FILE prints it."""
    epsilon: float = 1e-3
    """Of its norms, for tensors by name: 1e-3 for rgb_imagenet.pt, 1e-5 for i3d_pretrained_400.pt."""

    def load(self, device: str) -> Detector:
        from animatelcm.evaluate.i3d import load_i3d

        return load_i3d(self.weights, sha256=self.sha256, epsilon=self.epsilon, device=_place(device))


@dataclass(frozen=True, kw_only=True)
class EvalFvd:
    """FVD: the distance of real and generated videos."""

    real: Path
    """A folder of real videos, however deep (.avi, .mp4, .webm, .gif, .webp, ..., folders of numbered png), or a .txt
    that lists them."""
    generated: tuple[Path, ...]
    """The same of generated ones; several are lines of one table."""
    i3d: Annotated[I3dSource, arg(name="")]
    limit: int = 2048
    """Videos of each place, drawn by chance where there are more; papers take 2,048."""
    seed: int = 0
    """Of that draw."""
    mixed: bool = False
    """Admit folders of different numbers of videos, whose figures do not compare; the table names each protocol."""
    out: Path | None = None
    """Folder for scores.json and what is kept of videos, so that a second run measures what is new."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import fvd

        detector = self.i3d.load(self.device)
        options = {"limit": self.limit, "seed": self.seed, "mixed": self.mixed, "keep": _kept(self.out)}
        with bars(quiet=self.json) as progress:
            found = fvd.of_folders(detector, self.real, self.generated, **options, progress=progress)
        _tell(found, self.out, as_json=self.json, mixed=self.mixed)


@dataclass(frozen=True, kw_only=True)
class EvalClipsim:
    """CLIPSIM: how near frames are to their prompts."""

    videos: tuple[Path, ...]
    """Folders that animatelcm batch wrote, or of videos that carry their recipe; several are lines of one table."""
    prompts: Path | None = None
    """For other videos: a .jsonl of {"file", "prompt"}, files relative to their folder."""
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A CLIP in transformers' layout: a folder or a hub id. Default: what the papers take."""
    mixed: bool = False
    """Admit folders of different prompts, whose figures do not compare; the table names each protocol."""
    out: Path | None = None
    """Folder for scores.json and what is kept of videos, so that a second run measures what is new."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import clipsim

        clip = clipsim.load_clip(self.clip, _place(self.device))
        options = {"prompts": self.prompts, "mixed": self.mixed, "keep": _kept(self.out)}
        with bars(quiet=self.json) as progress:
            found = clipsim.of_folders(clip, self.videos, **options, progress=progress)
        _tell(found, self.out, as_json=self.json, mixed=self.mixed)


@dataclass(frozen=True, kw_only=True)
class EvalUcf101:
    """The papers' zero-shot row on UCF-101, from a model."""

    data: Positional[Path]
    """The folder of UCF-101: UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi and so on."""
    out: Path
    """Folder for batch/, videos/, draws.json, scores.json. The same line again makes what is missing."""
    i3d: Annotated[I3dSource, arg(name="")]
    clip: str = ""
    """For CLIPSIM too: a CLIP in transformers' layout, a folder or a hub id; papers take
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    per_class: int = 24
    """Videos of each of the 101 classes."""
    real: int = 2048
    """Real clips, one of each video drawn; as many of the generated videos are compared."""
    stride: int = 1
    """Real clips are every so-manieth frame; their files have 25 frames a second."""
    seed: int = 0
    """Of the draws, and of the first video; the next ones count on."""
    size: str | None = None
    """Width and height of the generated videos in pixels. Default: 512x512."""
    settings: tuple[str, ...] = ()
    """NAME=VALUE each, such as steps=4, as in batch. Default: 16 frames, else the model's own."""
    precision: Precision = "auto"
    """Numbers that the model computes with; auto: fp16 on CUDA, else fp32."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import clipsim, ucf101, zero_shot

        asked = zero_shot.plan(self.per_class, self.seed, _settings(self.settings, self.size))
        drawn = ucf101.draws(self.data, self.real, seed=self.seed, stride=self.stride)
        detector = self.i3d.load(self.device)
        clip = clipsim.load_clip(self.clip, _place(self.device)) if self.clip else None
        with told(quiet=self.json), bars(quiet=self.json) as progress:
            model = load(self.source, self.device, precision=self.precision, keep=False, adapters=())
            given = (model, self.source, asked, drawn, self.data, self.out, detector, clip)
            found = zero_shot.figures(*given, progress=progress)
        _tell(found, self.out, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class EvalVbench:
    """VBench: its videos made, judged by the tool, added up."""

    prompts: Positional[Path | None] = None
    """VBench_full_info.json, or the folder with it."""
    out: Path | None = None
    """Folder for batch/, videos/, results/, vbench.json. The same line again makes what is missing."""
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    dimensions: tuple[str, ...] = ()
    """Which of the sixteen. Default: all."""
    python: Path | None = None
    """python or vbench of an environment that has VBench, which judges the videos. Default: they are only made."""
    score_only: Path | None = None
    """Make and judge nothing: add the results up that lie in this folder."""
    seed: int = 0
    """Of the suite's first video; the next ones count on."""
    size: str | None = None
    """Width and height of the videos in pixels. Default: 512x512."""
    settings: tuple[str, ...] = ()
    """NAME=VALUE each, such as guidance=1.5, as in batch. Default: those of the published row of AnimateLCM."""
    precision: Precision = "auto"
    """Numbers that the model computes with; auto: fp16 on CUDA, else fp32."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def run(self) -> None:
        from animatelcm.evaluate import vbench_scores
        from animatelcm.evaluate.report import write_json

        results, remarks = self._judged() if self.score_only is None else (self.score_only, [])
        if results is None:
            said, shown = {}, f"videos in {self.out}/videos; the same line with --python has VBench judge them"
        else:
            found = vbench_scores.scores(results)
            said, shown = found._asdict(), vbench_scores.table(found)
        said |= {"results": str(results or ""), "remarks": remarks}
        if self.out is not None:
            write_json(said, self.out / "vbench.json")
        _remark(remarks)
        say(json.dumps(said) if self.json else shown)

    def _judged(self) -> tuple[Path | None, list[str]]:
        """Where the tool's results are, if it was asked, and what is to be said of the videos."""
        from animatelcm.evaluate import rows, vbench

        if self.prompts is None or self.out is None:
            raise ValueError(f"give {vbench.SUITE} and --out for videos, or --score-only for results that are there")
        dimensions, entries = self.dimensions or vbench.ALL, vbench.suite(self.prompts)
        asked = vbench.plan(entries, self.seed, dimensions=dimensions, settings={})
        asked = rows.filled(asked, _settings(self.settings, self.size), vbench.SETTINGS)
        tool = vbench.find_tool(self.python) if self.python else None
        with told(quiet=self.json), bars(quiet=self.json) as progress:
            model = load(self.source, self.device, precision=self.precision, keep=False, adapters=())
            videos = rows.make(asked, model, self.source, self.out, progress=progress)
            judged = tool and vbench.run(tool, entries, videos, self.out, dimensions=dimensions, progress=progress)
        return judged, rows.differences(asked, vbench.SETTINGS)


@dataclass(frozen=True, kw_only=True)
class EvalStability:
    """How steady videos are, and how much they move."""

    videos: Positional[tuple[Path, ...]]
    """Folders of videos, however deep, or a .txt that lists them; several are lines of one table."""
    mixed: bool = False
    """Admit folders of different numbers of videos; the table names each protocol."""
    out: Path | None = None
    """Folder for scores.json."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import stability
        from animatelcm.evaluate.viewing import of_folders

        _kept(self.out)
        with bars(quiet=self.json) as progress:
            found = of_folders(stability.scores, self.videos, frames=2, mixed=self.mixed, progress=progress)
        _tell(found, self.out, as_json=self.json, mixed=self.mixed)


def _place(device: str) -> str:
    from animatelcm.sampling import best_device

    return best_device() if device == "auto" else device


def _kept(out: Path | None) -> Path | None:
    """Where features lie. Raises ValueError for a folder that cannot be: before the work, not after it."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a folder")
    return None if out is None else out / "kept"


def _settings(settings: tuple[str, ...], size: str | None) -> tuple[str, ...]:
    """Of a batch, the size among them."""
    if size is None:
        return settings
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {size!r} is not WIDTHxHEIGHT in pixels, such as 512x512")
    return (*settings, f"width={width}", f"height={height}")


def _tell(found: Scored, out: Path | None, *, as_json: bool, mixed: bool = False) -> None:
    """Scores to a folder and to stdout, remarks to stderr."""
    from animatelcm.evaluate.emoji import versions
    from animatelcm.evaluate.report import write_json
    from animatelcm.evaluate.score import score_table

    said = {**found.to_json(), "versions": versions()}
    if out is not None:
        write_json(said, out / "scores.json")
    _remark(found.remarks)
    say(json.dumps(said) if as_json else score_table(found.scores, mixed=mixed))


def _remark(remarks: list[str]) -> None:
    for remark in remarks:
        sys.stderr.write(f"animatelcm: {remark}\n")
