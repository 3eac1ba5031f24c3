"""Build the emoji pack: icon sheets in several styles, their captions, and real animated clips.

    python scripts/build_emoji_pack.py --out build/pack
    python scripts/build_emoji_pack.py --out build/openmoji --styles openmoji --no-clips

Everything comes from pinned npm packages (22 MB, and 730 MB for the clips), so `npm` must be installed; the
vector styles also need `pip install resvg-py`. The pack's README tells the layout, the makers, the licences.
Concepts are those of the reference pack (the shipped one), and so are the emoji that have a clip. The latter
cannot be derived: they are those that Microsoft itself released as animations under the MIT licence.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

SIZE = 64  # pixels of an icon
COLUMNS = 40  # icons in a row of a sheet
DRAWN = 2 * SIZE  # pixels at which vectors are drawn, to be reduced by the same filter as pictures
CLIP_FRAMES = 16
CLIP_FPS = 8
FRAME_STRIDE = 3  # the animations run at 24 frames a second
MAX_KEYWORDS = 8
SHIPPED = Path(__file__).resolve().parents[1] / "src/animatelcm/assets/emoji/pack"

Style = Literal["noto", "twemoji", "fluent-flat", "openmoji", "fluent-3d"]
Record = dict[str, Any]
IconSet = Mapping[str, Any]  # an Iconify icons.json
Cells = dict[str, Image.Image]  # slug -> icon

log = logging.getLogger("build_emoji_pack")


# Name, version and SHA-256 of each archive on npm.
PINNED = """
@iconify-json/fluent-emoji-flat 1.2.6 7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175
@iconify-json/noto 1.2.9 3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad
@iconify-json/openmoji 1.2.29 03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5
@iconify-json/twemoji 1.2.5 19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7
@lobehub/fluent-emoji-3d 1.1.0 c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58
@lobehub/fluent-emoji-anim-1 1.0.0 4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea
@lobehub/fluent-emoji-anim-2 1.0.0 e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0
@lobehub/fluent-emoji-anim-3 1.0.0 3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43
@lobehub/fluent-emoji-anim-4 1.0.0 3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3
emojilib 4.0.3 7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303
unicode-emoji-json 0.9.0 ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401
"""
NOTO = "@iconify-json/noto"
VECTORS = {
    "noto": NOTO,
    "twemoji": "@iconify-json/twemoji",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "openmoji": "@iconify-json/openmoji",
}
ANIMATED = [f"@lobehub/fluent-emoji-anim-{number}" for number in (1, 2, 3, 4)]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to build and where."""

    out: Path
    """Folder of the new pack; must not hold a finished pack."""
    styles: tuple[Style, ...] = ("noto", "twemoji", "fluent-flat", "fluent-3d")
    """Sheets to build. OpenMoji is share-alike (CC-BY-SA-4.0), so it is built only on request."""
    clips: bool = True
    """Also build the animated clips."""
    cache: Path = Path.home() / ".cache/animatelcm/npm"
    """Where the downloaded archives are kept."""
    reference: Path = SHIPPED
    """Pack whose concepts and clips are rebuilt; without its concepts.jsonl, concepts are derived anew."""


@dataclass(frozen=True)
class Concept:
    """One emoji; `without` names the styles whose cell the reference pack leaves empty."""

    slug: str
    codepoints: str
    without: frozenset[str] = frozenset()


def fetch(package: str, cache: Path) -> Path:
    """The archive of a pinned package, downloaded unless the cache has it."""
    version, pinned = next(line[1:] for line in map(str.split, PINNED.split("\n")) if line[:1] == [package])
    archive = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if archive.exists():
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm is needed to download {package}; install Node.js, or put {archive} there")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [npm, "pack", "--silent", f"{package}@{version}"]
        log.info("downloading %s %s", package, version)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"npm could not download {package} {version}: {done.stderr.strip()[-300:]}")
        fetched = Path(folder) / archive.name
        digest = hashlib.sha256(fetched.read_bytes()).hexdigest()
        if digest != pinned:
            raise ValueError(f"{package} {version} has SHA-256 {digest}, not the pinned {pinned}; leave it")
        fetched.replace(archive)
    return archive


def read_json(archive: Path, member: str) -> Any:  # noqa: ANN401  (JSON)
    """One JSON file of an npm archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None, f"{member} is no plain file"
        return json.load(file)


def assets(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(codepoints, WebP file) of each picture, in one pass: seeking in a .tgz would be quadratic."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".webp" and (file := tar.extractfile(member)):
                yield path.stem, file.read()


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` if all goes well, and disappears if not."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(records: Iterable[Record], path: Path) -> None:
    with replacing(path) as temporary:
        lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="ascii")


def bare(codepoints: str) -> str:
    """Without variation selectors: sources disagree about them."""
    return "-".join(code for code in codepoints.split("-") if code != "fe0f")


def codepoints_of(emoji: str) -> str:
    """As in Iconify's chars.json: lower-case hexadecimal, at least four digits, joined by '-'."""
    return bare("-".join(f"{ord(character):04x}" for character in emoji))


def is_plain(codepoints: str) -> bool:
    """Neither a skin tone nor a flag of a country (two regional indicators) or region (tags)."""
    modifiers = (range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200), range(0xE0000, 0xE0080))
    return not any(int(code, 16) in span for code in codepoints.split("-") for span in modifiers)


def captions(names: Mapping[str, Record], keywords: Mapping[str, list[str]]) -> dict[str, Record]:
    """Codepoints -> name, group, keywords; from unicode-emoji-json and emojilib, both keyed by emoji."""
    words = {codepoints_of(emoji): found for emoji, found in keywords.items()}
    result = {}
    for emoji, facts in names.items():
        code = codepoints_of(emoji)
        first = [word.replace("_", " ") for word in words.get(code, [])[:MAX_KEYWORDS]]
        result[code] = {"name": facts["name"], "group": facts["group"], "keywords": first}
    return result


def listed_concepts(records: Sequence[Record]) -> list[Concept]:
    """The concepts of a reference pack, in its order."""
    known = {style for record in records for style in record["images"]}
    return [
        Concept(record["slug"], record["codepoints"], frozenset(known.difference(record["images"])))
        for record in records
    ]


def derived_concepts(chars: Mapping[str, str], icon_sets: Iterable[IconSet]) -> list[Concept]:
    """Every plain emoji that all icon sets draw, by slug; `chars` maps codepoints to slugs."""
    shared = set.intersection(*(set(icons["icons"]) for icons in icon_sets))
    codes = {slug: code for code, slug in chars.items() if slug in shared and is_plain(code)}
    return [Concept(slug, codes[slug]) for slug in sorted(codes)]


def svg_of(icons: IconSet, slug: str) -> str:
    """The icon as a square document, centred if it is not square itself; its size may be given by its set."""
    icon = icons["icons"][slug]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    head = f'xmlns="http://www.w3.org/2000/svg" width="{DRAWN}" height="{DRAWN}" viewBox="{box}"'
    return f"<svg {head}>{icon['body']}</svg>"


def draw(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("drawing vector emoji needs resvg; run `pip install resvg-py`") from error
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def reduced(picture: Image.Image) -> Image.Image:
    """RGBA at the pack's size."""
    return picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def raster_cells(pictures: Iterable[tuple[str, bytes]], concepts: Iterable[Concept]) -> Cells:
    """Cells of the concepts found among (codepoints, image file); an exact name wins over a bare one."""
    slugs = {bare(concept.codepoints): concept for concept in concepts}
    cells: Cells = {}
    for code, data in pictures:
        concept = slugs.get(bare(code))
        if concept and (concept.slug not in cells or code == concept.codepoints):
            cells[concept.slug] = reduced(Image.open(io.BytesIO(data)))
    return cells


def sheet_of(cells: Sequence[Image.Image | None]) -> Image.Image:
    """Cell i at column i % COLUMNS, row i // COLUMNS; None leaves it transparent."""
    sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(cells) // COLUMNS) * SIZE))
    for index, cell in enumerate(cells):
        if cell:
            sheet.paste(cell, (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
    return sheet


def build_sheet(style: str, concepts: Sequence[Concept], request: Request) -> set[str]:
    """Write one style's sheet; the slugs it shows."""
    wanted = [concept for concept in concepts if style not in concept.without]
    if style in VECTORS:
        icons = read_json(fetch(VECTORS[style], request.cache), "icons.json")
        slugs = (concept.slug for concept in wanted if concept.slug in icons["icons"])
        cells = {slug: reduced(draw(svg_of(icons, slug))) for slug in slugs}
    else:
        cells = raster_cells(assets(fetch("@lobehub/fluent-emoji-3d", request.cache)), wanted)
    sheet = sheet_of([cells.get(concept.slug) for concept in concepts])
    with replacing(request.out / f"{style}.webp") as temporary:
        sheet.save(temporary, "WEBP", quality=80, alpha_quality=90, method=6)
    log.info("%s: %d icons", style, len(cells))
    return set(cells)


def clip_of(animation: bytes) -> tuple[np.ndarray, int]:
    """(CLIP_FRAMES, SIZE, SIZE, 4) and the number of source frames; too short an animation is repeated."""
    source = Image.open(io.BytesIO(animation))
    count = getattr(source, "n_frames", 1)
    wanted = [FRAME_STRIDE * frame % count for frame in range(CLIP_FRAMES)]
    pixels = {}
    for frame in sorted(set(wanted)):  # in order: a WebP decoder starts again when sent back
        source.seek(frame)
        pixels[frame] = np.asarray(reduced(source))
    return np.stack([pixels[frame] for frame in wanted]), count


def over_alpha(clip: np.ndarray) -> np.ndarray:
    """(F, H, W, 4) uint8 -> (F, 2 H, W, 3): the picture on white above its alpha."""
    alpha = clip[..., 3:] / 255
    upper = np.round(clip[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.concatenate([upper, np.repeat(clip[..., 3:], 3, axis=-1)], axis=1)


def write_clips(clips: Iterable[np.ndarray], path: Path) -> None:
    """Encode equally long clips, each with one key frame, its first. One thread: the same file everywhere."""
    x264 = f"keyint={CLIP_FRAMES}:min-keyint={CLIP_FRAMES}:scenecut=0"
    options = {"crf": "27", "preset": "veryslow", "threads": "1", "x264-params": x264}
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, 2 * SIZE, "yuv420p"
        for frame in itertools.chain.from_iterable(map(over_alpha, clips)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def build_clips(chars: Mapping[str, str], words: Mapping[str, Record], request: Request) -> list[Record]:
    """Write the clips of the reference pack, in its order; what clips.jsonl says of each."""
    listing = request.reference / "clips.jsonl"
    if not listing.exists():
        raise ValueError(f"{listing} is missing: it lists the emoji whose clips may be used; add --no-clips")
    codes = [record["codepoints"] for record in read_lines(listing)]
    clips = {}
    for package in ANIMATED:
        pictures = assets(fetch(package, request.cache))
        clips |= {code: clip_of(data) for code, data in pictures if code in set(codes)}
        log.info("clips: %d of %d", len(clips), len(codes))
    write_clips((clips[code][0] for code in codes), request.out / "fluent-3d-clips.mp4")
    return [
        {"slug": chars[bare(code)], "codepoints": code}
        | words[bare(code)]
        | {"source_frames": clips[code][1], "first_frame": CLIP_FRAMES * index}
        for index, code in enumerate(codes)
    ]


def choose_concepts(chars: Mapping[str, str], request: Request) -> list[Concept]:
    listing = request.reference / "concepts.jsonl"
    if listing.exists():
        return listed_concepts(read_lines(listing))
    icon_sets = (read_json(fetch(package, request.cache), "icons.json") for package in VECTORS.values())
    return derived_concepts(chars, icon_sets)


def build(request: Request) -> None:
    """Write the pack; concepts.jsonl comes last, so a folder that holds it is complete."""
    if (request.out / "concepts.jsonl").exists():
        raise ValueError(f"{request.out} already holds a finished pack; choose another --out or remove it")
    request.out.mkdir(parents=True, exist_ok=True)
    names = read_json(fetch("unicode-emoji-json", request.cache), "data-by-emoji.json")
    words = captions(names, read_json(fetch("emojilib", request.cache), "dist/emoji-en-US.json"))
    chars = read_json(fetch(NOTO, request.cache), "chars.json")
    concepts = choose_concepts(chars, request)
    shown = {style: build_sheet(style, concepts, request) for style in request.styles}
    clips = build_clips(chars, words, request) if request.clips else []
    moving = {clip["slug"] for clip in clips}
    if clips:
        write_lines(clips, request.out / "clips.jsonl")
    records = (
        {"slug": concept.slug, "codepoints": concept.codepoints}
        | words[bare(concept.codepoints)]
        | {"images": [style for style in shown if concept.slug in shown[style]]}
        | {"clip": concept.slug in moving}
        for concept in concepts
    )
    write_lines(records, request.out / "concepts.jsonl")


def main() -> None:
    import tyro

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        build(tyro.cli(Request, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
