"""What is written down about every pass: its duration, what it changed, log lines and artifacts for ``tlparse``.

``TORCH_LOGS="fisedit_compiler"`` shows a line a pass, ``TORCH_LOGS="+fisedit_compiler"`` the graph after it as well;
``TORCH_TRACE=folder`` keeps the graphs as artifacts. Nothing is shown by default. No pass knows any of this.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.listing import listing

logger = logging.getLogger("fisedit_compiler.passes")


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its duration and how many call nodes of each operation it removed and added.

    ``source`` is the stage whose graph it was given, if that is not the one before.
    """

    name: str
    seconds: float
    removed: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    source: str = ""

    def __str__(self) -> str:
        changes = [f"-{count} {name}" for name, count in self.removed.items()]
        changes += [f"+{count} {name}" for name, count in self.added.items()]
        return f"{self.name}: {self.seconds * 1e3:.1f} ms, {', '.join(changes) or 'nothing changed'}"


Observer = Callable[[PassReport, fx.Graph], None]
"""Called with the graph as a pass left it; must not change it."""


class Made:
    """Holds the graph that was made inside :meth:`Instruments.made`."""

    graph: fx.Graph


class Instruments:
    """Watches the passes of one compilation.

    Attributes:
        reports: one per pass, in order.
    """

    def __init__(self, observe: Observer | None = None) -> None:
        self.reports: list[PassReport] = []
        self._observe = observe

    @contextmanager
    def watch(self, name: str, graph: fx.Graph) -> Iterator[None]:
        """Around a pass that changes ``graph`` in place."""
        before, start = operations(graph), time.perf_counter()
        yield
        seconds, after = time.perf_counter() - start, operations(graph)
        self.report(PassReport(name, seconds, dict(before - after), dict(after - before)), graph)

    @contextmanager
    def made(self, name: str, source: fx.Graph, source_name: str) -> Iterator[Made]:
        """Around making a graph from ``source``, which is that of the stage ``source_name``."""
        result, start = Made(), time.perf_counter()
        yield result
        seconds = time.perf_counter() - start
        before, after = operations(source), operations(result.graph)
        report = PassReport(name, seconds, dict(before - after), dict(after - before), source_name)
        self.report(report, result.graph)

    def report(self, report: PassReport, graph: fx.Graph) -> None:
        """Write down what a pass did."""
        self.reports.append(report)
        logger.info("%s", report)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("graph after %s\n%s", report.name, "\n".join(listing(graph)))
        torch._logging.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"fisedit_{len(self.reports):02}_{report.name}", "encoding": "string"},
            payload_fn=lambda: "\n".join([str(report), *listing(graph)]),
            expect_trace_id=False,
        )
        if self._observe is not None:
            self._observe(report, graph)


def operations(graph: fx.Graph) -> Counter[str]:
    """Call nodes by operation."""
    return Counter(ir.target_name(node.target) for node in graph.nodes if node.op == "call_function")
