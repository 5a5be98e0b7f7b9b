"""Which of a program's graphs a sparse call runs, and what the call takes of its results.

Every graph comes in two forms: one returns the model's outputs, the other also what an edit that records keeps of its
slots. Interpreted, a call runs the one that it needs. Lowered, each of the two would be a compilation that somebody
waits for. What an edit keeps are rows that the step computes anyway, so one compiled graph serves both, and a call that
records nothing leaves them where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from fisedit_compiler.lowering.lowered import Lowerable
from fisedit_compiler.lowering.program import CompiledProgram


@dataclass(frozen=True)
class GraphChoice:
    """A graph, and what of its results is read.

    Attributes:
        name: of the graph.
        updates: the slots that the call gets updates of, in order; they lie behind the model's outputs.
        unread: positions of results that the graph returns and the call does not want.
    """

    name: Lowerable
    updates: tuple[str, ...]
    unread: range


def shares_update() -> bool:
    """Whether lowered calls that record nothing run the graph of those that do."""
    return True


def choose_graph(program: CompiledProgram, *, update: bool, cut: bool, shallow: bool, lowered: bool) -> GraphChoice:
    """The graph of a sparse call.

    Args:
        program: whose graphs there are.
        update: whether the call records.
        cut: whether it keeps, or takes, rows at the program's cut.
        shallow: whether it takes them.
        lowered: whether it runs as Inductor and CUDA graphs make it.
    """
    runs_update = update or (lowered and shares_update())
    changes = program.reuse.updates if shallow else program.updates
    changed = tuple(change.slot for change in changes) if runs_update else ()
    first = len(program.outputs)
    unread = range(first, first if update else first + len(changed))
    return GraphChoice(_name(runs_update, cut, shallow), changed if update else (), unread)


def _name(update: bool, cut: bool, shallow: bool) -> Lowerable:
    if not cut:
        return "update" if update else "step"
    if shallow:
        return "reuse.shallow_update" if update else "reuse.shallow"
    return "reuse.full_update" if update else "reuse.full"
