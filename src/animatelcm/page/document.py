"""One HTML page from folders of results, to be looked at: figures, plots, and clips that play side by side.

It needs nothing but itself and the videos it refers to: no server, no network. What is drawn of each part is in
``page_tables``, ``page_clips`` and ``plots``.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from animatelcm import __version__
from animatelcm.images import replacing
from animatelcm.page import plots, sections
from animatelcm.page.clips import Address, clips_grids
from animatelcm.page.markup import Markup, tag
from animatelcm.page.sections import Section
from animatelcm.page.tables import (
    Measured,
    claims_table,
    pairs_table,
    rows_by_protocol,
    rows_table,
    score_tables,
    scores_table,
)

ASSETS = Path(__file__).parent.parent / "assets" / "page"
LIMIT = 50_000_000
"""Bytes of videos and pictures that a page may carry inside."""
TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".webm": "video/webm",
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
}
TYPES |= {".avi": "video/x-msvideo", ".gif": "image/gif", ".webp": "image/webp", ".png": "image/png"}
FEW = 8
"""Folders that are listed at once."""
SPEEDS = {"0.25": "\N{VULGAR FRACTION ONE QUARTER}", "0.5": "\N{VULGAR FRACTION ONE HALF}", "1": "1", "2": "2"}
SIZES = {"128": "small", "192": "medium", "320": "large", "512": "largest"}


def write(folder: Path, out: Path | None = None, *, title: str = "", embed: bool = False) -> Path:
    """Write the page of a folder (``sections.find``) and return its path, ``folder / "index.html"`` unless said.

    ``embed`` puts videos and pictures into it, for mailing. Raises ValueError where the folder holds nothing that can
    be shown, where a file of figures cannot be read, and for more than ``LIMIT`` bytes to be put in.
    """
    out = out or folder / "index.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"cannot write {out.name!r} as a page; give a name that ends in .html")
    found = sections.find(folder)
    address = _inside(found) if embed else _beside(out.parent)
    page = "<!doctype html>\n" + _html(found, title or sections.title(folder, found), folder, address)
    with replacing(out) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
    return out


def _beside(folder: Path) -> Address:
    """Addresses from where the page lies."""
    return lambda path: quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))


def _inside(found: Sequence[Section]) -> Address:
    """Files as addresses that hold them."""
    files = [clip.path for section in found for clip in section.clips if not clip.fault]
    total = sum(path.stat().st_size for path in {*files, *(path for section in found for path in section.pictures)})
    if total > LIMIT:
        said = f"videos and pictures are {total / 1e6:.0f} MB, and a page may carry {LIMIT / 1e6:.0f} MB"
        raise ValueError(f"{said}; leave --embed out, or give a folder inside")

    def address(path: Path) -> str:
        kind = TYPES.get(path.suffix.lower(), "application/octet-stream")
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    return address


def _html(found: Sequence[Section], title: str, root: Path, address: Address) -> Markup:
    style, script = (Markup((ASSETS / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"animatelcm {__version__}"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    ]
    names = {section.folder: f"s{number}" for number, section in enumerate(found)}
    measured = [_measured(section, names, apart=True) for section in found]
    together = [row for rows in measured for row in rows] if sum(map(bool, measured)) > 1 else []
    body = [
        tag("header", tag("h1", title), tag("p", _summary(found)), _contents(found, names, root), class_="top"),
        _bar() if any(section.clips for section in found) else None,
        tag("main", *_body(found, names, root, address, together)),
        tag("footer", f"Written by animatelcm {__version__}."),
        _dialog(),
        tag("script", script),
    ]
    return tag("html", tag("head", head), tag("body", body), lang="en")


def _body(
    found: Sequence[Section], names: dict[Path, str], root: Path, address: Address, together: list[Measured]
) -> list[Markup]:
    """Claims come first, then all figures side by side where they are of several folders, then each folder."""
    whole = tag("section", tag("h2", "All figures"), _rows(together, plotted=True), id="all") if together else None
    drawn = [_section(section, names, section.folder != root, address, plotted=not together) for section in found]
    first = 1 if found[0].claims else 0
    return [*drawn[:first], *([whole] if whole else []), *drawn[first:]]


def _section(section: Section, names: dict[Path, str], titled: bool, address: Address, plotted: bool) -> Markup:
    grids = clips_grids(section.clips, address) if section.clips else []
    rows = _rows(_measured(section, names), plotted)
    return tag(
        "section",
        tag("h2", section.title) if titled else None,
        [tag("p", remark, class_="remark") for remark in section.remarks],
        claims_table(section.claims) if section.claims else None,
        [scores_table(some) for some in score_tables(section.scores)],
        rows if plotted else _folded(f"{_count(len(section.rows), 'row')} of figures", rows),
        pairs_table(section.pairs) if section.pairs else None,
        grids,
        _pictures(section.pictures, address),
        id=names[section.folder],
    )


def _measured(section: Section, names: dict[Path, str], apart: bool = False) -> list[Measured]:
    where = {"section": section.title, "anchor": names[section.folder]} if apart else {}
    return [
        Measured(row=row, folder=str(section.folder), facts=section.protocols.get(row.protocol, {}), **where)
        for row in section.rows
    ]


def _rows(rows: Sequence[Measured], plotted: bool) -> list[Markup]:
    """A table for each protocol, and what can be drawn of its figures."""
    groups = rows_by_protocol(rows)
    parts = (
        [tag("p", f"Figures of {len(groups)} protocols do not compare, so each has its table.")]
        if len(groups) > 1
        else []
    )
    for some in groups.values():
        parts.append(rows_table(some))
        if plotted:
            parts.append(_plot(some))
    return parts


def _plot(rows: Sequence[Measured]) -> Markup:
    try:
        drawn = plots.excess([one.row for one in rows])
    except ImportError:
        return tag("p", "Without matplotlib there are no plots: pip install animatelcm[eval]", class_="soft")
    said = (
        f"How far clips are from real ones, above what as many other real clips are. Protocol {rows[0].row.protocol}."
    )
    return tag("figure", Markup(drawn), tag("figcaption", said), class_="plot") if drawn else Markup()


def _pictures(paths: Sequence[Path], address: Address) -> Markup | None:
    drawn = []
    for path in paths:
        width, height = _png_size(path)
        picture = tag("img", src=address(path), alt=path.stem, loading="lazy", width=width, height=height)
        drawn.append(tag("figure", picture, tag("figcaption", path.stem), class_="picture"))
    return tag("div", drawn, class_="pictures") if drawn else None


def _png_size(path: Path) -> tuple[int | None, int | None]:
    """From its header (PNG, 11.2.2), so that nothing moves while pictures come."""
    with path.open("rb") as file:
        header = file.read(24)
    found = header[:8] == b"\x89PNG\r\n\x1a\n" and len(header) == 24
    return (int.from_bytes(header[16:20]), int.from_bytes(header[20:])) if found else (None, None)


def _folded(title: str, parts: list[Markup]) -> Markup | None:
    """What stands elsewhere too."""
    return tag("details", tag("summary", title), parts) if parts else None


def _summary(found: Sequence[Section]) -> str:
    clips = [clip for section in found for clip in section.clips]
    absent = sum(bool(clip.fault) for clip in clips)
    claims, rows, scores = (sum(len(getattr(s, part)) for s in found) for part in ("claims", "rows", "scores"))
    said = [
        _count(claims, "claim") if claims else "",
        f"{_count(rows, 'row')} of figures" if rows else "",
        _count(scores, "score") if scores else "",
        f"{_count(len(clips) - absent, 'clip')} of {_count(len({c.line for c in clips}), 'prompt')}" if clips else "",
        f"{absent} missing" if absent else "",
    ]
    return ", ".join(filter(None, said))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _contents(found: Sequence[Section], names: dict[Path, str], root: Path) -> Markup | None:
    """Links to the sections, where there are several; many are shown when they are asked for."""
    inside = [section for section in found if section.folder != root]
    links = tag("ul", [tag("li", tag("a", section.title, href=f"#{names[section.folder]}")) for section in inside])
    if len(inside) < 2:
        return None
    folded = tag("details", tag("summary", f"{len(inside)} folders"), links)
    return tag("nav", links if len(inside) <= FEW else folded, aria_label="folders")


def _bar() -> Markup:
    """What plays, sizes and filters clips; shown where there is a script to do so."""
    parts = [
        tag("button", "Pause all", type="button", id="play", title="space"),
        tag("button", "Restart", type="button", id="restart", title="r"),
        tag("label", "speed", _choice("speed", SPEEDS, "1")),
        tag("label", "size", _choice("size", SIZES, "192")),
        tag("input", type="search", id="filter", placeholder="Filter prompts", aria_label="Filter prompts", title="/"),
        tag("output", id="count", for_="filter"),
    ]
    return tag("div", tag("div", parts), class_="bar", role="toolbar", aria_label="clips", hidden=True)


def _choice(name: str, options: dict[str, str], chosen: str) -> Markup:
    return tag("select", [tag("option", t, value=v, selected=v == chosen) for v, t in options.items()], id=name)


def _dialog() -> Markup:
    buttons = [
        tag("button", "\N{LEFTWARDS ARROW} before", type="button", class_="before"),
        tag("button", "after \N{RIGHTWARDS ARROW}", type="button", class_="after"),
        tag("span", "or the arrow keys", class_="soft"),
    ]
    shut = tag("button", "Close", type="button", class_="shut")
    words = tag("div", tag("h2", dir="auto"), tag("p", class_="about soft"))
    parts = [
        tag("header", words, shut),
        tag("div", class_="screen"),
        tag("div", class_="command"),
        tag("footer", buttons),
    ]
    return tag("dialog", tag("div", parts, class_="stage"), aria_label="one clip, large")
