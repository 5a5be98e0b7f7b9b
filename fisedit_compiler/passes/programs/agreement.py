"""Whether the kinds of a program's slots agree with themselves, asked before anything is made of them.

A slot of another package's kind is tried as the program uses it: with what its readers get, and with the rows that an
edit computes of it. How it is tried is told in ``slots/agreement/``.
"""

from __future__ import annotations

from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Program
from fisedit_compiler.passes.programs.recording import slot_updates
from fisedit_compiler.slots.agreement import Use, check_agreement


def check_slots(program: Program) -> None:
    """Check the slots of a lowered program.

    Raises:
        SlotKindError: the kind of one contradicts itself, or raised.
    """
    check_agreement(uses_of(program), program.captured.signature.device)


def uses_of(program: Program) -> list[Use]:
    """How a lowered program uses its slots."""
    origins = {node.name: node for node in program.captured.graph.nodes}
    rows: dict[str, ValueSpec] = {}
    whole = set()
    for update, node in slot_updates(program):
        if update.dim is None:
            whole.add(update.slot)
        else:
            rows[update.slot] = spec_of(node)
    return [
        Use(slot, spec_of(origins[slot.origin]), program.loaded.get(name), rows.get(name), name in whole)
        for name, slot in program.slots.items()
    ]
