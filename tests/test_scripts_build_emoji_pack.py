"""The emoji pack builder, offline: everything but the download and the drawing of vectors."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts/build_emoji_pack.py"
spec = importlib.util.spec_from_file_location("build_emoji_pack", SCRIPT)
pack = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = pack  # dataclasses look their module up
spec.loader.exec_module(pack)

WINK, HEART, THUMB, DARK_THUMB, FRANCE = (
    "\U0001f609",
    "\u2764\ufe0f",
    "\U0001f44d",
    "\U0001f44d\U0001f3ff",
    "\U0001f1eb\U0001f1f7",
)


def webp(*frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    first, *rest = map(Image.fromarray, frames)
    first.save(file, "WEBP", lossless=True, save_all=True, append_images=rest, duration=42)
    return file.getvalue()


def grey(level: int, alpha: int = 255) -> np.ndarray:
    return np.full((256, 256, 4), (level, level, level, alpha), np.uint8)


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@settings(deadline=None)
@given(st.text(min_size=1))
def test_codepoints_spell_the_emoji_without_variation_selectors(emoji):
    spelled = [chr(int(code, 16)) for code in pack.codepoints_of(emoji).split("-") if code]
    assert "".join(spelled) == emoji.replace("\ufe0f", "")


def test_only_skin_tones_and_flags_are_not_plain():
    plain = {emoji: pack.is_plain(pack.codepoints_of(emoji)) for emoji in (WINK, HEART, DARK_THUMB, FRANCE)}
    assert plain == {WINK: True, HEART: True, DARK_THUMB: False, FRANCE: False}


def test_codepoints_have_at_least_four_digits():
    assert pack.codepoints_of("\u00a9\ufe0f") == "00a9"


def test_derived_concepts_are_what_all_sets_draw_sorted_and_whatever_the_order_of_sets():
    slugs = {WINK: "wink", THUMB: "thumb", HEART: "heart", DARK_THUMB: "dark"}
    chars = {pack.codepoints_of(emoji): slug for emoji, slug in slugs.items()}
    sets = [{"icons": dict.fromkeys(names)} for names in (slugs.values(), ("wink", "heart", "dark"))]
    assert pack.derived_concepts(chars, sets) == [
        pack.Concept("heart", "2764"),
        pack.Concept("wink", "1f609"),
    ]
    assert pack.derived_concepts(chars, sets[::-1]) == pack.derived_concepts(chars, sets)


def test_an_icon_that_is_not_square_is_drawn_in_a_square():
    icons = {"height": 36, "width": 36, "icons": {"melon": {"body": "<path/>", "height": 25.5}}}
    svg = ElementTree.fromstring(pack.svg_of(icons, "melon"))
    assert svg.get("width") == svg.get("height")
    assert [float(number) for number in svg.get("viewBox").split()] == [0, 0, 36, 25.5]


def test_each_cell_is_where_its_index_says_and_a_missing_one_is_transparent():
    cells = [None if index % 7 == 3 else pack.reduced(Image.fromarray(grey(index))) for index in range(90)]
    sheet = np.asarray(pack.sheet_of(cells))
    for index, cell in enumerate(cells):
        row, column = divmod(index, pack.COLUMNS)
        there = sheet[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        assert np.array_equal(there, np.zeros((64, 64, 4)) if cell is None else np.asarray(cell))


@pytest.mark.parametrize("count", [13, 28, 72])
def test_a_clip_is_every_third_frame_and_short_animations_go_round(count):
    clip, frames = pack.clip_of(webp(*(grey(3 * frame) for frame in range(count))))
    assert frames == count
    assert clip[:, 5, 5, 0].tolist() == [3 * (3 * frame % count) for frame in range(16)]


@settings(deadline=None)
@given(picture=st.integers(0, 255), alpha=st.integers(0, 255), background=st.integers(0, 255))
def test_a_stacked_frame_can_be_put_on_any_background(picture, alpha, background):
    frame = pack.over_alpha(np.full((1, 4, 4, 4), (*[picture] * 3, alpha), np.uint8)).astype(float)
    upper, a = frame[0, 0, 0, 0], frame[0, 4, 0, 0] / 255
    assert upper - (1 - a) * 255 + (1 - a) * background == pytest.approx(picture * a + background * (1 - a), abs=0.51)


def test_every_clip_begins_with_the_only_key_frame_it_has(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 64, 64, 4), dtype=np.uint8)
    pack.write_clips(noise, tmp_path / "clips.mp4")
    with av.open(str(tmp_path / "clips.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [index for index, frame in enumerate(frames) if frame.key_frame] == [0, 16, 32]
    assert len(frames) == 48


def test_an_exact_file_name_wins_over_one_that_differs_by_a_selector():
    files = [("2764-fe0f", webp(grey(10))), ("2764", webp(grey(200))), ("1f44d", webp(grey(90)))]
    for order in (files, files[::-1]):
        cells = pack.raster_cells(order, [pack.Concept("heart", "2764")])
        assert {slug: cell.getpixel((9, 9))[0] for slug, cell in cells.items()} == {"heart": 200}


def test_a_download_without_npm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="npm is needed to download emojilib"):
        pack.fetch("emojilib", tmp_path / "cache")


def reference(folder: Path) -> Path:
    """Two concepts, of which one moves and one has no 3-D picture, and the clip of something else."""
    folder.mkdir()
    concepts = [("heart", "2764", ["noto", "fluent-3d"]), ("wink", "1f609", ["noto"])]
    records = [{"slug": slug, "codepoints": code, "images": images} for slug, code, images in concepts]
    pack.write_lines(records, folder / "concepts.jsonl")
    pack.write_lines([{"codepoints": code} for code in ("1f44d", "2764-fe0f")], folder / "clips.jsonl")
    return folder


def cached(folder: Path) -> Path:
    """The archives that a pack without vectors needs."""
    folder.mkdir()
    names = {
        emoji: {"name": name, "group": "G"} for emoji, name in ((WINK, "winking"), (HEART, "heart!"), (THUMB, "up"))
    }
    chars = {"2764": "heart", "1f609": "wink", "1f44d": "thumb"}
    jsons = {
        "unicode-emoji-json-0.9.0": ("data-by-emoji.json", names),
        "emojilib-4.0.3": ("dist/emoji-en-US.json", {HEART: ["red_heart", *"abcdefgh"], WINK: ["wink"]}),
        "iconify-json-noto-1.2.9": ("chars.json", chars),
    }
    for name, (member, content) in jsons.items():
        archive(folder / f"{name}.tgz", {member: json.dumps(content).encode()})
    pictures = {f"assets/{code}.webp": webp(grey(60)) for code in ("2764-fe0f", "1f609")}
    archive(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", pictures)
    moving = {1: {}, 2: {"1f44d": 5}, 3: {"2764-fe0f": 20, "1f609": 5}, 4: {}}
    for number, clips in moving.items():
        frames = {code: (grey(9 * frame) for frame in range(count)) for code, count in clips.items()}
        files = {f"assets/{code}.webp": webp(*found) for code, found in frames.items()}
        archive(folder / f"lobehub-fluent-emoji-anim-{number}-1.0.0.tgz", files)
    return folder


def test_a_pack_keeps_the_reference_concepts_order_and_gaps(tmp_path):
    request = pack.Request(
        out=tmp_path / "out",
        styles=("fluent-3d",),
        cache=cached(tmp_path / "cache"),
        reference=reference(tmp_path / "reference"),
    )
    pack.build(request)
    heart, wink = pack.read_lines(request.out / "concepts.jsonl")
    assert (heart["images"], heart["clip"], wink["images"], wink["clip"]) == (["fluent-3d"], True, [], False)
    assert heart["keywords"] == ["red heart", *"abcdefg"]
    clips = pack.read_lines(request.out / "clips.jsonl")
    facts = [(clip["slug"], clip["name"], clip["source_frames"], clip["first_frame"]) for clip in clips]
    assert facts == [("thumb", "up", 5, 0), ("heart", "heart!", 20, 16)]
    assert {path.name for path in request.out.iterdir()} == {
        "concepts.jsonl",
        "clips.jsonl",
        "fluent-3d.webp",
        "fluent-3d-clips.mp4",
    }
    with pytest.raises(ValueError, match="already holds a finished pack"):
        pack.build(request)
