"""An explanation as tables: for a terminal by rich, as plain text, as HTML for notebooks. No number is made here."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fisedit_compiler.geometry.block_costs import fits
from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.inspect.facts import ProgramExplanation, Work
from fisedit_compiler.runtime.sessions.measured import Measured

_UNWRAPPED = 10_000
"""Columns of plain text: no reason is broken in two, so a search finds it."""


def drawn(programs: Sequence[ProgramExplanation], note: str, measured: Sequence[Measured]) -> Group:
    """All tables of an explanation."""
    parts: list[RenderableType] = [Text(note)] if note else []
    for program in programs:
        parts.extend(_program(program))
    if measured:
        parts.append(_measured(measured))
    return Group(*parts)


def as_text(tables: Group) -> str:
    """Plain text without colours, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=_UNWRAPPED, color_system=None)
    with console.capture() as captured:
        console.print(tables)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def as_html(tables: Group) -> str:
    """A ``<pre>`` element."""
    console = Console(file=io.StringIO(), width=_UNWRAPPED, record=True)
    console.print(tables)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:normal">{code}</pre>')


def _program(program: ProgramExplanation) -> Iterator[RenderableType]:
    refused, recorded = len(program.refusals), sum(kind.slots for kind in program.slots)
    yield Text(
        f"program for {', '.join(program.inputs)}: {program.convolutions} sparse convolutions, {recorded} recorded "
        f"values a call, {refused} operations stay dense"
    )
    at = program.setting
    area = "" if program.area is None else f", {program.area:.1%} active sites"
    yield Text(
        f"numbers are for {at.height}x{at.width} sites{area}, batch {at.batch}, {at.tokens} tokens, on {at.device}"
    )
    yield _operations(program)
    if program.refusals:
        yield _refusals(program)
    if program.levels:
        yield _levels(program)
    if program.kernels:
        yield _kernels(program)
    yield _slots(program)
    yield _work(program)
    if program.reuse:
        yield Text(program.reuse)
    uncounted = dict.fromkeys(name for work in program.work for name in work.cost.uncounted)
    if uncounted:
        yield Text(f"bytes only, for want of a formula: {', '.join(uncounted)}")
    for work in program.work[:3]:
        if work.name.startswith("hoisted"):
            break
        yield Text(f"FLOPs, {work.name} = {work.cost.flops}")


def _operations(program: ProgramExplanation) -> Table:
    counted = ["captured", "rewritten", "hoisted", "fused", "kept", "refused"]
    table = _table("operations", ["operation"], [*counted, "dense FLOPs"])
    for row in program.operations:
        counts = (row.captured, row.rewritten, row.hoisted, row.fused, row.kept, row.refused)
        table.add_row(Text(row.operation), *(str(count or "") for count in counts), _percent(row.share))
    return table


def _refusals(program: ProgramExplanation) -> Table:
    table = _table("operations that stay dense", ["place", "operation", "reason"], ["share"])
    for row in program.refusals:
        place = ", ".join(part for part in (row.path or row.node, row.source) if part)
        table.add_row(Text(place), Text(row.operation), Text(row.reason), f"{row.share:.1%} of {row.of}")
    return table


def _levels(program: ProgramExplanation) -> Table:
    known = fits(program.setting.device)
    sizes = [f"{size} ({known[size].path})" if size in known else str(size) for size in BLOCK_SIZES]
    measured = "us of convolutions, estimated by block size" if known else "nobody measured this device type: size 1"
    table = _table(f"levels; {measured}", [], ["level", "active", "sites", "share", "block size", *sizes])
    for row in program.levels:
        size = "" if row.block_size is None else str(row.block_size)
        estimates = (f"{row.estimates[size]:.0f}" if size in row.estimates else "-" for size in BLOCK_SIZES)
        share = _percent(row.active / row.sites)
        table.add_row(str(row.level), str(row.active), str(row.sites), share, size, *estimates)
    return table


def _kernels(program: ProgramExplanation) -> Table:
    table = _table("kernels of the step", ["operation", "runs", "passed over"], ["calls"])
    for row in program.kernels:
        passed_over = "; ".join(f"{name}: {reason}" for name, reason in row.passed_over.items())
        table.add_row(Text(row.operation), Text(row.runs), Text(passed_over), str(row.calls))
    return table


def _slots(program: ProgramExplanation) -> Table:
    calls = program.setting.calls
    title = f"recording, of {calls} calls" if calls else "recording"
    table = _table(title, ["kind of slot"], ["slots", "MiB a call", *(["GiB in all"] if calls else [])])
    total = ("all", sum(kind.slots for kind in program.slots), program.recorded_bytes)
    for kind, slots, nbytes in [*((row.kind, row.slots, row.nbytes) for row in program.slots), total]:
        cells = [str(slots), _significant(nbytes / 2**20)]
        table.add_row(kind, *cells, *([_significant(nbytes * calls / 2**30)] if calls else []))
    return table


def _work(program: ProgramExplanation) -> Table:
    table = _table("cost", ["graph", "runs"], ["GFLOP", "of dense", "MiB moved", "of dense", "measured"])
    dense = program.work[0]
    for row in program.work:
        flops = "" if row.flops is None else _significant(row.flops / 1e9)
        moved = "" if row.nbytes is None else _significant(row.nbytes / 2**20)
        shares = (_of(row.flops, dense.flops), _of(row.nbytes, dense.nbytes))
        table.add_row(Text(row.name), row.when, flops, shares[0], moved, shares[1], _time(row))
    return table


def _measured(measured: Sequence[Measured]) -> Table:
    title = "calls timed last; on CUDA, their launches"
    table = _table(title, ["kind", "input", "device"], ["calls", "active", "ms"])
    for row in measured:
        size = f"{row.height}x{row.width}, batch {row.batch}"
        table.add_row(row.kind, size, row.device, str(row.calls), f"{row.area:.1%}", f"{row.seconds * 1e3:.2f}")
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in words:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _significant(number: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share else ""


def _of(part: int | None, whole: int | None) -> str:
    return "" if part is None or not whole else f"{part / whole:.1%}"


def _time(work: Work) -> str:
    return "" if work.measured is None else f"{work.measured.seconds * 1e3:.2f} ms"
