"""Videos as PyAV sees them: H.264 in mp4 out, any stream that it knows in."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from animatelcm.images import Note

_T = TypeVar("_T")

_BT709, _UNSPECIFIED = 1, 2  # codes of ITU-T H.273 for primaries, transfer and matrix alike
# SWS_BICUBIC | ACCURATE_RND | FULL_CHR_H_INT | FULL_CHR_H_INP: the fast paths of swscale darken by one level.
_EXACT_CONVERSION = 0x4 | 0x40000 | 0x2000 | 0x4000
_REORDERING = 16  # frames: the most that H.264 lets decoding order differ from display order
_ROUNDING = Fraction(1, 500)  # seconds: no container that rounds times has coarser ticks


class Header(NamedTuple):
    """What a file says of itself; ``fps`` is None for a still image."""

    num_frames: int
    fps: Fraction | None
    metadata: dict[str, str]


class Window(NamedTuple):
    """Which frames are wanted: number floor(start + i * stride) for i < count (None: all there are)."""

    start: int
    stride: Fraction
    count: int | None

    def choose(self, numbered: Iterable[tuple[int, _T]]) -> Iterator[_T]:
        taken = 0
        for number, item in numbered:
            if number == self.start + int(taken * self.stride):
                yield item
                taken += 1
            if taken == self.count:
                return


Decoded = tuple[list[np.ndarray], Fraction, dict[str, str]]
"""The frames of a window; frame rate and metadata of the whole file."""
Span = tuple[int, _T, Fraction]
"""A frame's number, what it is decoded from, and until when it is shown at least: seconds after the first began."""


def by_rate(items: Iterable[_T], rate: Fraction) -> Iterator[Span[_T]]:
    """Spans of equal length."""
    if rate <= 0:
        raise ValueError(f"it has {rate} frames a second")
    return ((number, item, (number + 1) / rate) for number, item in enumerate(items))


def on_show(
    spans: Iterable[Span[_T]], fps: Fraction, count: int, decode: Callable[[_T], np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and pixels of what is shown after i / fps seconds, for i < count. Each is decoded once."""
    i, shown = 0, None
    for number, item, until in spans:
        while i < count and i / fps < until:
            if number != shown:
                shown, pixels = number, decode(item)
            yield number, pixels
            i += 1
        if i == count:
            return


def write_mp4(chunks: Iterator[np.ndarray], path: Path, note: Note, quality: int) -> None:
    """H.264 in yuv420p, BT.709, index first (faststart): what browsers play as it loads. Each frame is encoded as it
    comes."""
    frames = chain.from_iterable(chunks)
    first = next(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"mp4 needs an even width and height, got {width}x{height}; crop, or write .webp or .gif")
    # Said, because swscale puts chroma samples there, and decoders otherwise take them to be on the left.
    options = {"crf": str(round(51 - 0.43 * quality)), "chroma_sample_location": "center"}
    if width % 128:  # x264's look-ahead reads past such rows, and chooses other B frames from run to run
        options["bf"] = "0"
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = note.to_json()
        stream = container.add_stream("libx264", rate=note.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        for index, array in enumerate(chain([first], frames)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT_CONVERSION,
            )
            frame.pts, frame.time_base = index, 1 / note.fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    if path.suffix.lower() in (".m4v", ".mov", ".mp4"):
        _check_boxes(path)
    with av.open(str(path), metadata_errors="replace") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield container, container.streams.video[0]


def _check_boxes(path: Path) -> None:
    """Every top-level box (ISO 14496-12: 4 bytes of size, 4 of name, 8 of long size) must end in the file."""
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position < size and re.match(rb"(?s).{4}[a-zA-Z0-9 ]{4}", header := file.read(16)):
            length = int.from_bytes(header[8:16] if header[:4] == b"\0\0\0\1" else header[:4], "big")
            position += length or size - position  # 0: to the end
            file.seek(position)
    if position > size:
        raise ValueError(f"its last {position - size} bytes are missing")


def _shown_packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    return (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _rate(stream: VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError("it has no frame rate")
    return rate


def probe_stream(path: Path) -> Header:
    """From the index of the file, or by counting packets where it has none (mkv, webm)."""
    with _opened(path) as (container, stream):
        count = stream.frames or sum(1 for _ in _shown_packets(container, stream))
        return Header(count, _rate(stream), Note.parse(container.metadata.get("comment", "")).metadata)


def read_stream(path: Path, window: Window) -> Decoded:
    """Turned as the file says (phones), converted with the matrix that it names."""
    with _opened(path) as (container, stream):
        numbered = _frames_from(container, stream, window.start)
        images = [_decoded(frame) for frame in window.choose(numbered)]
        return images, _rate(stream), Note.parse(container.metadata.get("comment", "")).metadata


def _frames_from(container: InputContainer, stream: VideoStream, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames in display order with their numbers, beginning at ``start`` or some frames before."""
    times = [packet.pts for packet in _shown_packets(container, stream)] if start else []
    if start and None not in times:  # some AVIs have no display times: they are counted from the beginning
        times.sort()
        container.seek(times[max(0, min(start, len(times)) - 1 - _REORDERING)], stream=stream)
        yield from ((bisect_left(times, frame.pts), frame) for frame in container.decode(stream))
    else:
        if start:
            container.seek(0)
        yield from enumerate(container.decode(stream))


def follow_stream(path: Path, fps: Fraction, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """By presentation times, which packets tell before they are decoded; by the average rate where some have none."""
    with _opened(path) as (container, stream):
        times = _times(container, stream, count / fps)
    with _opened(path) as (container, stream):
        frames, rate = _frames_from(container, stream, 0), _rate(stream)
        timed = _spans(frames, times, rate, stream.time_base)
        spans = timed if times else by_rate((frame for _, frame in frames), rate)
        yield from on_show(spans, fps, count, _decoded)


def _times(container: InputContainer, stream: VideoStream, seconds: Fraction) -> list[int]:
    """Presentation times in ticks, in order, of the frames within ``seconds`` and the next; none if any has none."""
    times: list[int] = []
    beyond = 0
    for packet in _shown_packets(container, stream):
        if packet.pts is None:
            return []
        insort(times, packet.pts)
        beyond += (packet.pts - times[0]) * stream.time_base > seconds
        if beyond > _REORDERING:
            break
    return times


def _spans(
    numbered: Iterable[tuple[int, av.VideoFrame]], times: list[int], rate: Fraction, tick: Fraction
) -> Iterator[Span[av.VideoFrame]]:
    """Each frame until the next packet's time, and once more until the next frame's: some packets show nothing."""

    def begins(number: int, pts: int | None) -> Fraction:
        """Containers round times: a frame less than a tick from its place at a constant rate is in that place."""
        place = number / rate
        if pts is None or first is None:
            return place
        said = (pts - first) * tick
        return place if abs(said - place) < tick else said - min(tick, _ROUNDING)

    first = frame = None
    for number, following in numbered:
        if frame is None:
            first = following.pts
        else:
            yield number - 1, frame, begins(number, following.pts)
        frame = following
        later = len(times) if frame.pts is None else bisect_right(times, frame.pts)
        if later < len(times):
            yield number, frame, begins(number + 1, times[later])
    if frame is not None:
        length = (frame.duration or 0) * tick
        constant = not length or abs(length - 1 / rate) < tick
        yield number, frame, begins(number, frame.pts) + (1 / rate if constant else length)


def _decoded(frame: av.VideoFrame) -> np.ndarray:
    if frame.is_corrupt:
        raise ValueError(f"the frame at {frame.time} s is damaged")
    hd = frame.colorspace == _BT709 or (frame.colorspace == _UNSPECIFIED and frame.height >= 720)
    pixels = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709 if hd else Colorspace.ITU601,
        interpolation=_EXACT_CONVERSION,
    )
    return np.rot90(pixels.to_ndarray(), frame.rotation // 90)
