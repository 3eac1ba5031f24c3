"""Reports as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def table(report: dict[str, Any]) -> str:
    """A report as lines: phase, who, median, p95, times faster, share of what the machine does at best; or what steers,
    how many times as long as text alone, and memory."""
    return "\n".join([_title(report), *(_costs(report) if report["case"]["steer"] else _comparison(report))])


def _title(report: dict[str, Any]) -> str:
    case, facts = report["case"], report["machine"]
    return (
        f"{report['model']}: {case['frames']} frames of {case['size']}x{case['size']}, {case['steps']} steps, "
        f"guidance {case['guidance']:g}, batch {case['batch']}; {report['dtype']} on "
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads"
    )


def _comparison(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'phase':<18}{'':<20}{'median':>10}{'p95':>10}{'first':>10}{'faster':>9}{'of machine':>12}"
    for phase, timings in report["seconds"].items():
        for name, timing in timings.items():
            times = f"{timing['median'] / timings['ours']['median']:.2f}"
            share = report["share_of_machine"].get(phase, {}).get(name)
            yield (
                f"{phase:<18}{name:<20}{timing['median']:>9.3f}s{timing['p95']:>9.3f}s{timing['first']:>9.3f}s"
                f"{'' if name == 'ours' else times:>9}{'' if share is None else f'{share:.0%}':>12}"
            )
    sides = (
        f"{name} {_mib(report['weights_bytes'][name])} + {_mib(peak)} ({_mib(report['process_bytes'][name])} held)"
        for name, peak in report["peak_bytes_prompt_to_frames"].items()
    )
    yield f"MiB at most, prompt to frames, weights + tensors: {', '.join(sides)}"
    differences = report["differences"]
    yield (
        f"largest differences on the same input: network {differences['network']:.1e} deviations, "
        f"decoder {differences['decoder']:.0f} of 255 levels"
    )


def _costs(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'denoising':<18}{'median':>10}{'p95':>10}{'first':>10}{'times text':>12}{'peak, MiB':>12}{'weights':>9}"
    timings = report["seconds"]["denoise"]
    for name, timing in timings.items():
        yield (
            f"{name if name == 'text' else f'text + {name}':<18}{timing['median']:>9.3f}s{timing['p95']:>9.3f}s"
            f"{timing['first']:>9.3f}s{timing['median'] / timings['text']['median']:>12.2f}"
            f"{_mib(report['peak_bytes_denoise'][name]):>12}{_mib(report['weights_bytes'][name]):>9}"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"
