"""Which of a program's graphs a sparse call runs, and what the call takes of its results.

Every graph comes in several forms: one returns the model's outputs, another also what an edit that records keeps of its
slots, a third also what an edit that reuses values keeps at the program's cut. Interpreted, a call runs the one that it
needs. Lowered, each would be a compilation that somebody waits for. What an edit keeps are rows that the step computes
anyway, so one compiled graph serves all, and a call leaves what it does not want where it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from fisedit_compiler.lowering.lowered import Lowerable
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.passes.programs.reuse import Cut


@dataclass(frozen=True)
class GraphChoice:
    """A graph, and what of its results is read.

    Attributes:
        name: of the graph.
        updates: the slots that the call gets updates of, in order; they lie behind the model's outputs.
        unread: positions of results that the graph returns and the call does not want.
        places: where each update is among the results that are wanted.
    """

    name: Lowerable
    updates: tuple[str, ...]
    unread: frozenset[int]
    places: Mapping[str, int]


def shares_update() -> bool:
    """Whether lowered calls that keep nothing run the graph of those that do."""
    return True


def choose_graph(
    program: CompiledProgram, *, update: bool, cut: bool, shallow: bool, lowered: bool, reuses: bool = False
) -> GraphChoice:
    """The graph of a sparse call.

    Args:
        program: whose graphs there are.
        update: whether the call records.
        cut: whether it keeps, or takes, rows at the program's cut.
        shallow: whether it takes them.
        lowered: whether it runs as Inductor and CUDA graphs make it.
        reuses: whether other calls may keep rows at the cut.
    """
    runs_update = update or (lowered and shares_update())
    runs_cut = cut or (lowered and shares_update() and isinstance(program.cut, Cut) and (reuses or program.has_reuse))
    changes = program.reuse.updates if shallow else program.updates
    changed = tuple(change.slot for change in changes) if runs_update else ()
    first = len(program.outputs)
    kept = first + len(changed)
    unread = set() if update else set(range(first, kept))
    if runs_cut and not cut:
        assert isinstance(program.cut, Cut)
        unread |= set(range(kept, kept + len(program.cut.values)))
    wanted = changed if update else ()
    places = {name: place for place, name in enumerate(wanted, start=first)}
    return GraphChoice(_name(runs_update, runs_cut, shallow), wanted, frozenset(unread), places)


def _name(update: bool, cut: bool, shallow: bool) -> Lowerable:
    if not cut:
        return "update" if update else "step"
    if shallow:
        return "reuse.shallow_update" if update else "reuse.shallow"
    return "reuse.full_update" if update else "reuse.full"


def kept_by_edits(
    program: CompiledProgram, name: Lowerable
) -> tuple[dict[int, tuple[int, Fraction]], dict[int, Hashable]]:
    """Which results of a graph are rows, and which are kept and dropped together, both by position.

    They are those of :class:`~fisedit_compiler.runtime.execution.owned_outputs.OwnedOutputs`.
    """
    rows: dict[int, tuple[int, Fraction]] = {}
    together: dict[int, Hashable] = {}
    if not name.endswith("update"):
        return rows, together
    levels = {slot.name: slot.layout.level for slot in program.slots}
    deep = program.cut.deep if isinstance(program.cut, Cut) else frozenset()
    changes = program.reuse.updates if name == "reuse.shallow_update" else program.updates
    for position, changed in enumerate(changes, start=len(program.outputs)):
        level = levels[changed.slot]
        if changed.dim is not None and level is not None:
            rows[position] = (changed.dim, level)
        # A later edit replaces the rows of a level all at once, and a shallow call has none of the deep slots.
        together[position] = (level, changed.dim is None, changed.slot in deep)
    return rows, together
