"""Where the time of one sparse call goes: its operations as torch.profiler saw them, drawn along a line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from fisedit_compiler.pages import render

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


@dataclass(frozen=True)
class Bar:
    """An event as a rectangle."""

    event: Event
    x: float
    y: int
    width: float
    height: int
    colour: str


def draw_timeline(events: list[Event]) -> Markup:
    """The events along a line, one row per operation that took most, and a table of their sums, as HTML."""
    begin = min((event.start for event in events), default=0.0)
    span = max(max((event.start + event.duration for event in events), default=0.0) - begin, 1e-9)
    sums: dict[str, list[float]] = defaultdict(list)
    for event in events:
        sums[event.name].append(event.duration)
    ranked = sorted(sums, key=lambda name: -sum(sums[name]))
    rows = {name: number for number, name in enumerate(ranked[:12])}
    bars = []
    for event in events:
        row = rows.get(event.name, len(rows))
        x, width = (event.start - begin) / span * _WIDTH, max(event.duration / span * _WIDTH, 0.4)
        bars.append(Bar(event, x, row * _ROW + 2, width, _ROW - 4, _COLOURS[row % len(_COLOURS)]))
    return render(
        __package__,
        "timeline.html",
        events=events,
        width=_WIDTH,
        height=(min(len(ranked), 12) + 1) * _ROW + 4,
        bars=bars,
        sums=[(name, sum(sums[name]), len(sums[name])) for name in ranked[:40]],
        total=sum(event.duration for event in events),
        span=span,
    )
