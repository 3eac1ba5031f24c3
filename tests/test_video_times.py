"""Frames are followed as players show them, by their times, and in step with a constant rate where there is one."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from animatelcm import streams, video
from footage import CONTAINERS, noise, smooth

RATES = (24, Fraction(24000, 1001), Fraction(30000, 1001), 30, Fraction(15, 2), 8, 25)
CODECS = {".avi": "mpeg4", ".mkv": "libx264", ".mov": "libx264", ".mp4": "libx264", ".webm": "libvpx"}
UNEVEN = (0, 1, 2, 3, 10, 11, 14, 30, 31, 32, 33, 40)
"""When frames begin, in 24ths of a second: 12 frames in 41 of them."""


def clip(
    path: Path, ticks: tuple[int, ...] | range, rate: float | Fraction = 24, *, last: int = 1, **options: str
) -> Path:
    """Frame i is a plain grey of level 5 i and begins after ticks[i] / rate seconds; the last is shown for ``last``."""
    base = 1 / Fraction(rate)
    with av.open(str(path), "w") as container:
        options = {"g": "5", **({"bf": "2"} if path.suffix != ".webm" else {}), **options}
        stream = container.add_stream(CODECS[path.suffix], rate=Fraction(rate), options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 2_000_000
        stream.codec_context.time_base = base
        packets = []
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 5 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tick, base
            packets += stream.encode(frame)
        packets += stream.encode()
        if last > 1:
            packets[-1].duration = last
        for packet in packets:
            container.mux(packet)
    return path


def followed(path: Path, fps: float | Fraction, count: int) -> list[int]:
    """Numbers, which the pixels confirm where they are those of ``clip``."""
    found = list(video.follow(path, Fraction(fps), count))
    assert [round(pixels.mean() / 5) for _, pixels in found] == [number for number, _ in found]
    return [number for number, _ in found]


def by_rate(rate: float | Fraction, fps: float | Fraction, count: int, total: int) -> list[int]:
    numbers = [math.floor(i * Fraction(rate) / Fraction(fps)) for i in range(count)]
    return [number for number in numbers if number < total]


def by_ticks(ticks: tuple[int, ...], fps: float | Fraction, count: int, rate: int = 24, last: int = 1) -> list[int]:
    """The last frame that has begun, until the video ends."""
    moments = [Fraction(i * rate) / Fraction(fps) for i in range(count)]
    return [max(n for n, tick in enumerate(ticks) if tick <= t) for t in moments if t < ticks[-1] + last]


# Streams


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("rate", RATES)
def test_a_constant_rate_is_kept_in_step_with(tmp_path, suffix, rate):
    """Though mkv and webm say milliseconds: at 23.976 frames a second frame 3 begins 0.125 ms after an eighth."""
    path = clip(tmp_path / f"a{suffix}", range(48), rate)
    for fps in (8, 24, 12, 10, Fraction(24000, 1001), 7.5, 60, rate, Fraction(rate) * 2, Fraction(rate) / 3):
        for count in (1, 6, 200):
            assert followed(path, fps, count) == by_rate(rate, fps, count, 48)


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("fps", [8, 24, 12, 7, 5, Fraction(24000, 1001), 48])
def test_a_variable_rate_is_followed_by_times(tmp_path, suffix, fps):
    """Also where these are rounded up, or ticks are as long as frames (avi), and where frames are stored out of order,
    which in an avi would lose their times."""
    path = clip(tmp_path / f"a{suffix}", UNEVEN, **({"bf": "0"} if suffix == ".avi" else {}))
    assert followed(path, fps, 200) == by_ticks(UNEVEN, fps, 200)
    assert followed(path, fps, 4) == by_ticks(UNEVEN, fps, 4)


def test_a_frame_left_out_moves_those_after_it(tmp_path):
    """By a tick, which in an avi is a whole frame and no rounding."""
    ticks = (0, 1, 2, 4, 5, 6, 8, 9)
    path = clip(tmp_path / "a.avi", ticks, bf="0")
    assert followed(path, 24, 200) == by_ticks(ticks, 24, 200) == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".mp4", ".webm"])
def test_times_count_from_the_first_frame(tmp_path, suffix):
    path = clip(tmp_path / f"a{suffix}", tuple(tick + 127 for tick in UNEVEN))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).pts > 0
    assert followed(path, 8, 200) == by_ticks(UNEVEN, 8, 200)


@pytest.mark.parametrize("last", [1, 7, 31])
def test_it_ends_with_the_last_frames_own_duration(tmp_path, last):
    path = clip(tmp_path / "a.mp4", UNEVEN, last=last, bf="0")
    assert followed(path, 8, 200) == by_ticks(UNEVEN, 8, 200, last=last)
    assert followed(path, 24, 200)[-last - 1 :] == [10, *[11] * last]


def test_a_last_frame_that_does_not_say_is_shown_for_one_of_the_rate(tmp_path, monkeypatch):
    path, frames_from = clip(tmp_path / "a.mp4", UNEVEN, last=20, bf="0"), streams._frames_from

    def silent(*arguments):
        for number, frame in frames_from(*arguments):
            yield number, SimpleNamespace(pts=frame.pts, duration=0)

    monkeypatch.setattr(streams, "_frames_from", silent)
    monkeypatch.setattr(streams, "_decoded", lambda _: np.zeros((1, 1, 3), np.uint8))
    shown = Fraction(40, 24) + 1 / video.probe(path).fps
    assert len(list(video.follow(path, Fraction(24), 200))) == math.ceil(24 * shown) < 60


def test_an_edit_list_cuts_the_beginning_off(tmp_path):
    """ISO 14496-12: after ``elst``, version and flags, and the number of edits, come duration and first time shown."""
    path = clip(tmp_path / "a.mp4", range(40))
    raw = path.read_bytes()
    at = raw.index(b"elst") + 12
    duration, begin = struct.unpack(">Ii", raw[at : at + 8])
    path.write_bytes(raw[:at] + struct.pack(">Ii", duration - 5000 // 24, begin + 5 * 512) + raw[at + 8 :])
    found = list(video.follow(path, Fraction(8), 200))
    assert [number for number, _ in found] == by_rate(24, 8, 200, 35)
    assert [round(pixels.mean() / 5) for _, pixels in found] == [5 + number for number, _ in found]


def test_without_display_times_frames_are_counted(tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4", UNEVEN)
    rate = video.probe(path).fps
    assert by_rate(rate, 8, 200, 12) != by_ticks(UNEVEN, 8, 200)
    monkeypatch.setattr(streams, "_shown_packets", lambda *_: iter([SimpleNamespace(pts=t) for t in (0, None, 1024)]))
    assert followed(path, 8, 200) == by_rate(rate, 8, 200, 12)


def test_packets_that_show_nothing_change_nothing(tmp_path, monkeypatch):
    """VP8 stores pictures to predict from as packets of their own."""
    path, packets = clip(tmp_path / "a.mp4", UNEVEN), streams._shown_packets

    def more(*arguments):
        for packet in packets(*arguments):
            yield packet
            yield SimpleNamespace(pts=packet.pts + 1)

    monkeypatch.setattr(streams, "_shown_packets", more)
    assert followed(path, 8, 200) == by_ticks(UNEVEN, 8, 200)


@pytest.mark.parametrize("ticks", [range(40), UNEVEN], ids=["constant", "uneven"])
@pytest.mark.parametrize("timed", [True, False])
def test_nothing_is_decoded_before_it_is_asked_for_or_after_the_last(tmp_path, monkeypatch, ticks, timed):
    path, frames_from, drawn = clip(tmp_path / "a.mkv", ticks), streams._frames_from, []

    def counted(*arguments):
        for number, frame in frames_from(*arguments):
            drawn.append(number)
            yield number, frame

    monkeypatch.setattr(streams, "_frames_from", counted)
    if not timed:
        monkeypatch.setattr(streams, "_times", lambda *_: [])
    frames = video.follow(path, Fraction(10), 5)
    assert not drawn
    for number, _ in frames:
        assert drawn == list(range(number + 1))
    assert 3 <= number <= 9


def test_pixels_are_decoded_once_each(tmp_path, monkeypatch):
    path, decoded, converted = clip(tmp_path / "a.mp4", range(10)), streams._decoded, []
    monkeypatch.setattr(streams, "_decoded", lambda frame: converted.append(1) or decoded(frame))
    assert followed(path, 72, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert len(converted) == 3


ROUNDED = st.sampled_from([round, math.floor, math.ceil])


def shown(times: list[int], rate: Fraction, tick: Fraction, fps: Fraction, count: int) -> list[int]:
    """Numbers of frames that begin at those ticks, the last of unknown length."""
    frames = [SimpleNamespace(pts=time, duration=None) for time in times]
    spans = streams._spans(enumerate(frames), times, rate, tick)
    return [number for number, _ in streams.on_show(spans, fps, count, lambda frame: frame)]


@settings(deadline=None)
@given(
    rate=st.fractions(1, 240, max_denominator=1001),
    fps=st.fractions(1, 240, max_denominator=1001),
    first=st.fractions(0, 10, max_denominator=7000),
    rounded=ROUNDED,
)
def test_rounded_times_of_a_constant_rate_are_those_of_the_rate(rate, fps, first, rounded):
    times = [rounded(1000 * (first + i / rate)) for i in range(40)]
    assert shown(times, rate, Fraction(1, 1000), fps, 100) == by_rate(rate, fps, 100, 40)


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    fps=st.sampled_from([24, 12, 8, 48, 6]),
    first=st.integers(0, 100),
    rounded=ROUNDED,
)
def test_rounded_times_show_what_unrounded_ones_do(gaps, fps, first, rounded):
    """Frames that begin at 24ths, of which moments are asked for that are halves or multiples."""
    ticks = tuple(sum(gaps[:i]) for i in range(len(gaps) + 1))
    times, rate = [rounded(Fraction(1000 * (first + tick), 24)) for tick in ticks], Fraction(len(ticks), ticks[-1] + 1)
    count = ticks[-1] * fps // 24 + 1
    assert shown(times, 24 * rate, Fraction(1, 1000), Fraction(fps), count) == by_ticks(ticks, fps, count)


# Animations and sequences


def animation(path: Path, delays: list[int]) -> Path:
    """Somebody else's, of noise that changes in part; frame i has level 10 i in its corner."""
    frames = np.stack([noise(24, 24, 3)] * len(delays))
    for i, frame in enumerate(frames):
        frame[:8, :8] = 10 * i
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=delays, lossless=True)
    return path


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [8, 30, 100, 3])
def test_delays_of_others_are_kept(tmp_path, suffix, fps):
    delays = [40, 300, 70, 1000, 20, 250]
    path, ends = animation(tmp_path / f"a{suffix}", delays), np.cumsum(delays)
    found = list(video.follow(path, Fraction(fps), 300))
    moments = [1000 * i / fps for i in range(300)]
    assert [number for number, _ in found] == [int(sum(ends <= t)) for t in moments if t < sum(delays)]
    frames = video.read(path).frames
    assert all(np.array_equal(pixels, frames[number]) for number, pixels in found)
    assert [int(pixels[0, 0, 0]) for _, pixels in found] == [10 * number for number, _ in found]
    assert [number for number, _ in islice(video.follow(path, Fraction(fps), 3), 3)] == [n for n, _ in found[:3]]


@pytest.mark.parametrize(("delays", "fps", "rate"), [([0, 0, 0, 0], 20, 10), ([50, 0, 50, 0], 20, Fraction(40, 3))])
def test_without_a_delay_a_picture_is_shown_as_browsers_do(tmp_path, delays, fps, rate):
    path = animation(tmp_path / "a.gif", delays)
    assert video.probe(path) == (4, rate, {})
    assert video.read(path).fps == rate
    shown = [number for number, delay in enumerate(delays) for _ in range(2 if delay == 0 else 1)]
    assert [number for number, _ in video.follow(path, Fraction(fps), 100)] == shown


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("rate", [8, Fraction(24000, 1001), 30])
def test_our_own_files_keep_the_rate_of_their_note(tmp_path, container, rate):
    """Delays of whole milliseconds or hundredths do not say it, nor do equal neighbours, which are merged."""
    frames = np.concatenate([smooth(4), smooth(9)[[8] * 4], smooth(20)[15:]])
    path = video.write(frames, tmp_path / f"a{container}", fps=rate)
    stored = video.read(path).frames
    for fps in (8, 24, 60):
        found = list(video.follow(path, Fraction(fps), 300))
        assert [number for number, _ in found] == by_rate(rate, fps, 300, 13)
        assert all(np.array_equal(pixels, stored[number]) for number, pixels in found)


def test_of_a_sequence_only_what_is_asked_for_is_opened(tmp_path):
    path = video.write(smooth(9, 16, 16), tmp_path / "frames", fps=24)
    for number in (1, 2, 4, 5, 7, 8):
        (path / f"{number:05}.png").write_bytes(b"damaged, but not needed")
    assert [number for number, _ in video.follow(path, Fraction(8), 3)] == [0, 3, 6]
    with pytest.raises(ValueError, match=r"cannot read .*00001\.png"):
        list(video.follow(path, Fraction(24), 3))


def test_a_retimed_gif_is_followed_by_its_delays(tmp_path):
    path = video.write(smooth(6, 16, 16), tmp_path / "a.gif", fps=10)
    path.write_bytes(path.read_bytes().replace(b"\x0a\x00", b"\x14\x00"))  # 20 hundredths of a second, not 10
    assert [number for number, _ in video.follow(path, Fraction(10), 7)] == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".mkv"])
def test_what_cannot_be_followed_is_said_in_one_sentence(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="there is no file or folder"):
        next(video.follow(path, Fraction(8), 3))
    path.write_bytes(noise(5000).tobytes())
    with pytest.raises(ValueError, match=rf"^cannot read .*a{suffix} \(.*\): .*remake it$") as error:
        next(video.follow(path, Fraction(8), 3))
    assert "\n" not in str(error.value)
    for fps, count in ((0, 3), (-8, 3), (8, 0)):
        with pytest.raises(ValueError, match="more than 0, and 1 at least, are needed"):
            next(video.follow(path, Fraction(fps), count))


def test_a_video_of_no_frames_is_said(tmp_path):
    path = video.write(smooth(1, 16, 16), tmp_path / "frames", fps=8)
    (path / "00000.png").unlink()
    (path / "metadata.json").write_text('{"fps": "8", "num_frames": 0, "metadata": {}}')
    with pytest.raises(ValueError, match="it shows no frame"):
        next(video.follow(path, Fraction(8), 3))
