"""Clips of a page side by side: a line a prompt, a column a setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from animatelcm.evaluate.report import CEILINGS, Kind
from animatelcm.page.gallery import Clip
from animatelcm.page.markup import Markup, tag
from animatelcm.page.tables import code

Address = Callable[[Path], str]
"""Where a page finds a file."""
KINDS = {
    "clips": "captions as in training",
    "images": "one frame of each subject",
    "plain": "a clip of each subject",
    "motions": "subjects under each motion",
    "held_out": "subjects under motions that training never showed together",
}
STILL = (".png", ".gif", ".webp")
"""Pictures, and animations that run as they like."""


def clips_grids(clips: Sequence[Clip], address: Address) -> list[Markup]:
    """A grid for each kind, and before them what chooses columns."""
    columns = _columns(clips)
    order = [kind for kind in get_args(Kind) if any(clip.kind == kind for clip in clips)]
    kinds = order + list(dict.fromkeys(clip.kind for clip in clips if clip.kind not in order))
    boxes = [
        tag("label", tag("input", type="checkbox", value=number, checked=True), name)
        for number, name in enumerate(columns)
    ]
    chooser = (
        tag("fieldset", tag("legend", "Columns"), boxes, class_="columns", hidden=True) if len(columns) > 1 else None
    )
    return [
        chooser or Markup(),
        *(_grid([clip for clip in clips if clip.kind == kind], columns, address) for kind in kinds),
    ]


def _columns(clips: Sequence[Clip]) -> list[str]:
    """Real clips first, then settings as they come."""
    names = list(dict.fromkeys(clip.setting for clip in clips if clip.setting))
    return sorted(names, key=lambda name: CEILINGS.index(name) if name in CEILINGS else len(CEILINGS))


def _grid(clips: Sequence[Clip], columns: Sequence[str], address: Address) -> Markup:
    here = [name for name in columns if any(clip.setting == name for clip in clips)]
    lines: dict[tuple[str, str, str], list[Clip]] = {}
    for clip in clips:
        lines.setdefault(clip.line, []).append(clip)
    number = {name: columns.index(name) for name in here}
    heads = [tag("th", name, scope="col", data_column=number[name]) for name in here]
    rows = []
    for some in lines.values():
        cells = [
            tag(
                "td",
                [_cell(clip, address) for clip in some if clip.setting == name] or _gap("-"),
                data_column=number[name],
            )
            for name in here
        ]
        if not some[0].setting:
            cells = [tag("td", [_gap(clip.fault, across=True) for clip in some], colspan=max(1, len(here)))]
        rows.append(tag("tr", tag("th", _asked(some[0]), scope="row"), cells, class_="line"))
    kind, count = clips[0].kind, "1 prompt" if len(lines) == 1 else f"{len(lines)} prompts"
    title = tag("h3", kind.replace("_", " "), tag("small", KINDS.get(kind, ""))) if kind else None
    head = tag("thead", tag("tr", tag("th", count, scope="col"), heads))
    width = {"class_": "grid" if len(here) > 1 else "grid single", "style": f"--columns: {len(here)}"}
    return tag("div", title, tag("table", head, tag("tbody", rows), **width), class_="gridded")


def _asked(clip: Clip) -> list[Markup]:
    beside = ", ".join(filter(None, [f"seed {clip.seed}" if clip.seed else "", clip.given]))
    return [tag("span", clip.prompt, class_="prompt", dir="auto"), tag("span", beside, class_="seed")]


def _cell(clip: Clip, address: Address) -> Markup:
    if clip.fault:
        return _gap(clip.fault)
    said = f"{clip.prompt}, {clip.setting}"
    width, height = clip.size or (None, None)
    source = address(clip.path)
    if clip.path.suffix.lower() in STILL:
        picture = tag("img", src=source, alt=said, loading="lazy", width=width, height=height, class_="clip")
    else:
        attributes = {"preload": "none", "muted": True, "loop": True, "playsinline": True, "controls": True}
        picture = tag("video", src=source, aria_label=said, width=width, height=height, class_="clip", **attributes)
    took = tag("span", f"{clip.seconds:.2f} s", class_="took") if clip.seconds is not None else None
    how = tag("details", tag("summary", "command"), code(clip.command)) if clip.command else None
    under = tag("figcaption", tag("span", clip.setting, class_="where"), took, how)
    return tag("figure", tag("div", picture, class_="frame"), under, class_="cell", data_setting=clip.setting)


def _gap(said: str, across: bool = False) -> Markup:
    return tag("p", said, class_="gap across" if across else "gap")
