"""The graph after every pass: what ``compiled.stages()`` gives.

Graphs are not kept while a model is compiled (SDXL has five thousand nodes and twenty stages): the passes run again
on the captured graph, which takes about a second, and this time each graph is copied.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO, overload

from torch import fx

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.graph.listing import listing

if TYPE_CHECKING:
    from rich.table import Table

    from fisedit_compiler.lowering.program import CompiledProgram
    from fisedit_compiler.passes.instruments import PassReport


@dataclass(frozen=True)
class Stage:
    """A graph as one pass left it.

    Attributes:
        name: the pass; ``capture``, ``lower``, ``recording``, ``stores``, ``update`` and ``step`` are the compiler's
            own stages. ``capture`` is without what computes nothing, as captures are kept on disk; ``stores`` also
            returns what an edit writes, and ``update`` is what hoisting leaves of it. On a GPU torch.compile gets
            ``update_repeated``, for edits that record and for those that do not. It is made from ``update_cut``, and
            that from ``update_staged``; ``step_repeated`` and the others are the same without the stores.
            ``recording_maps``, ``reuse`` and ``reuse_recording`` are there once cross-attention maps were asked for;
            ``full``, ``shallow``, ``full_update`` and ``shallow_update`` once an edit reused what an earlier call of it
            computed.
        seconds: what the pass took.
        removed: call nodes it removed, by operation.
        added: call nodes it added, by operation.
        graph: a copy.
        source: the stage that it was made from.
    """

    name: str
    seconds: float
    removed: dict[str, int]
    added: dict[str, int]
    graph: fx.Graph
    source: str = ""

    @cached_property
    def lines(self) -> list[str]:
        """The graph as text, a line a node; see :func:`fisedit_compiler.graph.listing.listing`."""
        return listing(self.graph)

    def print(self, file: TextIO | None = None) -> None:
        """Print the graph: readable code with layouts, shapes and module paths as comments."""
        print("\n".join(self.lines), file=file)

    def excerpt(self, path: str) -> str:
        """The part of the graph that comes from one module of the user's model and what is in it.

        Args:
            path: dotted path, such as ``down_blocks.0.resnets.0``.
        """
        return "\n".join(listing(self.graph, path))

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Stages(Sequence[Stage]):
    """The stages of one program, in order; by position or by name."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self._stages]

    @overload
    def __getitem__(self, key: int | str) -> Stage: ...

    @overload
    def __getitem__(self, key: slice) -> Stages: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            for stage in self._stages:
                if stage.name == key:
                    return stage
            raise KeyError(f"{key!r} is no stage; the stages are {self.names}")
        return Stages(self._stages[key]) if isinstance(key, slice) else self._stages[key]

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def diff(self, first: int | str, second: int | str, context: int = 2) -> str:
        """What changed from one stage to another, as a unified diff of their texts.

        Args:
            first: position or name of the earlier stage.
            second: position or name of the later one.
            context: unchanged lines around a change.
        """
        before, after = self[first], self[second]
        lines = difflib.unified_diff(before.lines, after.lines, before.name, after.name, lineterm="", n=context)
        return "\n".join(lines)

    def changes(self, key: int | str, context: int = 2) -> str:
        """What a stage changed, as :meth:`diff` from the one that it was made from; empty for the first."""
        stage = self[key]
        return self.diff(stage.source, self._stages.index(stage), context) if stage.source else ""

    def to_dict(self) -> list[dict[str, Any]]:
        """Name, source, milliseconds, number of nodes, removed and added operations of every stage."""
        return [
            {
                "name": stage.name,
                "source": stage.source,
                "ms": round(stage.seconds * 1e3, 3),
                "nodes": len(stage.graph.nodes),
                "removed": stage.removed,
                "added": stage.added,
            }
            for stage in self._stages
        ]

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="stages")
        for column in ("", "stage", "ms", "nodes", "removed", "added"):
            table.add_column(column, justify="right" if column in ("", "ms", "nodes") else "left")
        for number, stage in enumerate(self._stages):
            removed, added = (", ".join(f"{n} {op}" for op, n in of.items()) for of in (stage.removed, stage.added))
            if stage.name == "capture":
                added = ""
            row = (str(number), stage.name, f"{stage.seconds * 1e3:.1f}", str(len(stage.graph.nodes)), removed, added)
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def stages_of(program: CompiledProgram) -> Stages:
    """Compile a program's captured graph again, keeping a copy of the graph after every pass.

    Lowering is done again, too, also where nothing runs lowered.
    """
    from fisedit_compiler.graph.ir import copy_graph
    from fisedit_compiler.lowering.lowered import CUT, LOWERABLE
    from fisedit_compiler.lowering.program import compile_captured
    from fisedit_compiler.passes import Instruments

    stages: list[Stage] = []

    def keep(report: PassReport, graph: fx.Graph) -> None:
        source = report.source or (stages[-1].name if stages else "")
        stages.append(Stage(report.name, report.seconds, report.removed, report.added, copy_graph(graph), source))

    seconds = program.seconds.get("capture", 0.0)
    again = compile_captured(program.captured, program.config, keep, capture_seconds=seconds)
    for name in LOWERABLE:
        again.make_lowered(name, Instruments(keep))
    if program.has_maps:
        again.make_maps(Instruments(keep))
    if program.has_reuse:
        again.__dict__["reuse"] = again.make_reuse(Instruments(keep))
        for name in CUT:
            again.make_lowered(name, Instruments(keep))
    return Stages(stages)


def choose_program(programs: Sequence[CompiledProgram], index: int) -> CompiledProgram:
    """One of a module's programs.

    Raises:
        ConfigError: there is none yet, or not so many.
    """
    if not programs:
        raise ConfigError(
            "Nothing is compiled yet: record a call, or pass example_inputs to sparsify. Known model classes are "
            "compiled at once."
        )
    if not -len(programs) <= index < len(programs):
        raise ConfigError(f"There are {len(programs)} programs, one per call signature; {index} is none of them.")
    return programs[index]
