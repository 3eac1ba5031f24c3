"""The page in a real browser: videos play, all in step, and what one clicks does what it says."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import browser
from animatelcm.page import document
from results import batch, evaluation, rows

PROGRAM = browser.found()
pytestmark = pytest.mark.skipif(not PROGRAM, reason="no chromium here: apt-get install chromium, or $CHROMIUM")
CLIPS = "[...document.querySelectorAll('video.clip')]"
PLAYING = f"{CLIPS}.filter(v => v.readyState >= 3 && !v.paused && v.currentTime > 0)"
TIMES = f"{PLAYING}.map(v => v.currentTime)"
PERIOD = 2.0  # seconds


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.start(PROGRAM, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture
def tab(chromium):
    chromium.complaints.clear()
    yield chromium
    assert not chromium.complaints


def opened(tab, folder: Path) -> None:
    """At its first clips."""
    tab.open(document.write(folder).as_uri())
    tab.run("(document.querySelector('.grid') || document.body).scrollIntoView()")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "page"
    evaluation(path / "a", rows("lcm@1", "lcm@4", "lcm@16"), kept=["a fox", "a red cat", "a bus", "an owl"])
    return batch(path / "b", ["a parrot", "a <i>pizza</i>"]).parent


def apart(times: list[float]) -> float:
    """The most by which two places in a loop differ, in seconds."""
    pairs = itertools.combinations(times, 2)
    return max((min((a - b) % PERIOD, (b - a) % PERIOD) for a, b in pairs), default=0.0)


def in_step(tab, least: int, within: float = 0.1) -> tuple[float, list[float]]:
    """When so many videos were seen together, less than a frame apart: the page's clock, and their times."""
    deadline = time.monotonic() + 15
    while True:
        now, times = tab.run(f"[performance.now() / 1000, {TIMES}]")
        if len(times) >= least and apart(times) < within:
            return now, times
        assert time.monotonic() < deadline, times
        time.sleep(0.1)


def test_videos_play_from_a_file_all_in_step(tab, folder):
    opened(tab, folder)
    before, times = in_step(tab, 6)
    tab.run("scrollTo(0, document.body.scrollHeight)")  # those that come into view join in
    tab.until(f"{CLIPS}.slice(-4).every(v => v.readyState >= 3 && v.currentTime > 0)")
    for _ in range(3):  # and they stay
        now, joined = in_step(tab, 4)
        time.sleep(0.7)
    moved = (joined[-1] - times[0] - (now - before)) % PERIOD
    assert min(moved, PERIOD - moved) < 0.25  # time goes on at its own pace
    assert set(tab.run(f"{CLIPS}.map(v => v.videoWidth)")) <= {0, 64}


def test_all_pause_and_play_and_restart_together(tab, folder):
    opened(tab, folder)
    in_step(tab, 6)
    tab.run("play.click()")
    held = f"{CLIPS}.filter(v => v.readyState).map(v => v.currentTime)"
    tab.until(f"{CLIPS}.every(v => v.paused && !v.seeking) && Math.max(...{held}) - Math.min(...{held}) < 0.02")
    times = tab.run(held)
    time.sleep(0.5)
    assert tab.run(held) == times
    assert tab.run("play.textContent") == "Play all"
    tab.key(" ", 32)
    in_step(tab, 6)
    slow = "speed.value = '0.25', speed.dispatchEvent(new Event('change'))"
    began = tab.run(f"{slow}, restart.click(), performance.now() / 1000")
    now, times = in_step(tab, 6, within=0.05)
    assert 0 < max(times) < (now - began) / 4 + 0.15


def test_lines_are_filtered_and_columns_hidden(tab, folder):
    opened(tab, folder)
    seen = "[...document.querySelectorAll('tr.line')].filter(e => e.checkVisibility()).map(e => e.cells[0].innerText)"
    assert len(tab.run(seen)) == 6
    tab.run("filter.value = 'RED cat', filter.dispatchEvent(new Event('input'))")
    assert [text.split("\n")[0] for text in tab.run(seen)] == ["a red cat"]
    assert tab.run("count.textContent") == "1 of 6"
    tab.run("filter.value = '', filter.dispatchEvent(new Event('input'))")
    columns = "[...document.querySelectorAll('#s0 .grid thead th')].filter(e => !e.hidden).map(e => e.innerText)"
    assert tab.run(columns) == ["4 prompts", "lcm@1", "lcm@4", "lcm@16"]
    tab.run("document.querySelector('#s0 .columns input[value=\"1\"]').click()")
    assert tab.run(columns) == ["4 prompts", "lcm@1", "lcm@16"]
    tab.until("[...document.querySelectorAll('#s0 td[data-column=\"1\"] video')].every(v => !v.getAttribute('src'))")
    assert tab.run("document.querySelectorAll('#s1 td[data-column=\"1\"]')[0].checkVisibility()")


def test_a_click_enlarges_and_keys_go_on(tab, folder):
    opened(tab, folder / "b")
    tab.run("document.querySelectorAll('.enlarge')[0].click()")
    shown = "[document.querySelector('.about').textContent, document.querySelector('dialog h2').textContent]"
    assert tab.run(shown) == ["lcm@1 \N{MIDDLE DOT} seed 0 \N{MIDDLE DOT} 0.75 s", "a parrot"]
    large = "document.querySelector('.screen video')"
    assert tab.until(f"{large}.clientWidth >= 256 && {large}.clientWidth % 64 === 0 && {large}.currentTime > 0")
    tab.key("ArrowRight", 39)
    tab.key("ArrowDown", 40)
    assert tab.run(shown) == ["lcm@4 \N{MIDDLE DOT} seed 1 \N{MIDDLE DOT} 0.75 s", "a <i>pizza</i>"]
    assert "--steps 4" in tab.run("document.querySelector('dialog code').textContent")
    tab.key("Escape", 27)
    tab.until("!document.querySelector('dialog').open && !document.querySelector('.screen video')")


def test_tables_are_sorted_by_their_numbers(tab, tmp_path):
    figures = zip(rows("lcm@1", "lcm@2", "lcm@4"), (900.0, 1200.0, 50.5), strict=True)
    opened(tab, evaluation(tmp_path, [replace(row, fvd_like=value) for row, value in figures]))
    click = "[...document.querySelectorAll('thead button')].find(b => b.textContent.startsWith('FVD')).click()"
    order = "[...document.querySelectorAll('tbody')].map(b => b.rows[0].cells[2].textContent)"
    tab.run(click)
    assert tab.run(order) == ["lcm@4", "lcm@1", "lcm@2"]
    tab.run(click)
    assert tab.run(order) == ["lcm@2", "lcm@1", "lcm@4"]
    line = "document.querySelector('tr.more').checkVisibility()"
    assert not tab.run(line)
    tab.run("document.querySelector('.open').click()")
    assert tab.run("document.querySelectorAll('tr.more')[0].innerText").startswith("measured by")


def test_two_hundred_videos_play_only_where_they_are_seen(tab, tmp_path):
    opened(tab, batch(tmp_path / "b", [f"prompt {i}" for i in range(50)], steps=(1, 2, 4, 8)))
    tab.until(f"{PLAYING}.length >= 8")
    loaded = f"{CLIPS}.filter(v => v.readyState > 0)"
    assert tab.run(f"{CLIPS}.length") == 200
    assert tab.run(f"{loaded}.length") <= 40
    tab.run("scrollTo(0, document.body.scrollHeight)")
    tab.until(f"{CLIPS}.slice(-4).every(v => v.readyState >= 3 && v.currentTime > 0)")
    assert tab.until(f"{loaded}.length <= 40")


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server: it knows no parts of files (Range), so that a browser cannot seek."""

    def log_message(self, *_):
        pass


def test_a_plain_server_suffices(tab, folder):
    document.write(folder / "b")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder / "b"))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}/index.html"
        tab.open(here)
        tab.until(f"{PLAYING}.length === 4")
        began = tab.run("performance.now() / 1000")
        while in_step(tab, 4)[0] < began + 1.5 * PERIOD:  # past the end of the loop
            time.sleep(0.3)
        tab.open("about:blank#done")
        server.shutdown()
    tab.complaints[:] = [text for text in tab.complaints if here.rpartition("/")[0] not in text]


def test_one_file_has_it_all_in_light_dark_and_on_a_phone(tab, folder, tmp_path):
    out = document.write(folder / "b", tmp_path / "one.html", embed=True)
    tab.open(out.as_uri())
    tab.until(f"{PLAYING}.length === 4")
    papers, pictures = [], []
    for scheme in ("light", "dark"):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        papers.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        pictures.append(tab.screenshot(tmp_path / f"{scheme}.png").read_bytes())
    assert papers[0] != papers[1]
    assert min(map(len, pictures)) > 5000
    tab.call("Emulation.setEmulatedMedia", features=[])
    tab.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.call("Emulation.clearDeviceMetricsOverride")


def test_those_who_want_no_motion_get_none_unasked(tab, folder):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    opened(tab, folder / "b")
    tab.until(f"{CLIPS}.every(v => v.readyState >= 2)")
    assert tab.run(f"{CLIPS}.every(v => v.paused && v.currentTime < 0.02)")
    tab.run("play.click()")
    tab.until(f"{PLAYING}.length === 4")
    tab.call("Emulation.setEmulatedMedia", features=[])


def test_a_broken_video_is_said_to_be_one(tab, folder, tmp_path):
    made = batch(tmp_path / "b", ["a fox"])
    document.write(made)
    (made / "000001.mp4").write_bytes(b"no video")  # since the page was written
    tab.open((made / "index.html").as_uri())
    tab.until("document.querySelectorAll('.broken').length === 1")
    tab.until(f"{PLAYING}.length === 1")
