"""Where the time of one sparse call goes: its operations as torch.profiler saw them, drawn along a line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

_WIDTH, _ROW = 1200, 18
_COLOURS = ("#1971c2", "#2b8a3e", "#e8590c", "#9c36b5", "#0c8599", "#f08c00", "#c2255c", "#5f3dc4")


@dataclass(frozen=True)
class Event:
    """One operation or kernel: name, start and duration in microseconds."""

    name: str
    start: float
    duration: float


def profile_call(call: Callable[[], Any], device: torch.device) -> list[Event]:
    """The outermost operations of a call on a processor, the kernels of a call on a GPU, in order of start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = []
    for event in profiler.events() or []:
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel if on_gpu else (event.cpu_parent is None and event.name.startswith(("aten::", "fisedit::"))):
            events.append(Event(event.name, event.time_range.start, event.time_range.elapsed_us()))
    return sorted(events, key=lambda event: event.start)


def draw_timeline(events: list[Event]) -> str:
    """The events along a line, one row per operation that took most, and a table of their sums, as HTML."""
    if not events:
        return "<p>The profiler saw no operation.</p>"
    begin = min(event.start for event in events)
    span = max(max(event.start + event.duration for event in events) - begin, 1e-9)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        sums[event.name][0] += event.duration
        sums[event.name][1] += 1
    ranked = sorted(sums, key=lambda name: -sums[name][0])
    rows = {name: number for number, name in enumerate(ranked[:12])}
    height = (min(len(ranked), 12) + 1) * _ROW + 4
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" class="timeline">']
    for event in events:
        row = rows.get(event.name, len(rows))
        x, width = (event.start - begin) / span * _WIDTH, max(event.duration / span * _WIDTH, 0.4)
        parts.append(
            f'<rect x="{x:.1f}" y="{row * _ROW + 2}" width="{width:.1f}" height="{_ROW - 4}" '
            f'fill="{_COLOURS[row % len(_COLOURS)]}"><title>{escape(event.name)} {event.duration:.1f} µs</title></rect>'
        )
    parts.append("</svg><table><tr><th>operation</th><th>calls</th><th>ms</th><th>share</th></tr>")
    total = sum(event.duration for event in events)
    for name in ranked[:40]:
        spent, calls = sums[name]
        parts.append(
            f"<tr><td>{escape(name)}</td><td>{calls:.0f}</td><td>{spent / 1e3:.2f}</td>"
            f"<td>{spent / total:.1%}</td></tr>"
        )
    parts.append(f"</table><p>{len(events)} operations, {span / 1e3:.2f} ms from the first to the last.</p>")
    return "\n".join(parts)
