"""Whether what a kind of slots says agrees with itself: tried on a small example before a program is used.

A kind that contradicts itself would otherwise end a run with a raw error, some only in an edit of an edit, or give a
wrong picture. So every slot of such a kind takes the whole way once, on a CPU and on few sites: it is stored, read,
taken apart by samples, and edited twice. One that took it is not tried again, whatever program it is in. The package's
own kinds take it in its tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fisedit_compiler.errors import SlotKindError
from fisedit_compiler.slots.agreement.example import Example, NoExample, Use
from fisedit_compiler.slots.agreement.trial import Trial
from fisedit_compiler.slots.registry import is_own

_agreed: set[Any] = set()
"""Slots that took the way, by all that it depends on."""


def check_agreement(uses: Iterable[Use], device: str = "cpu", *, own: bool = False) -> None:
    """Check that the kinds of slots agree with themselves.

    Args:
        uses: of all slots of a program.
        device: of the program; what has no kernel on a CPU is tried there.
        own: whether the package's own kinds are tried, too.

    Raises:
        SlotKindError: one does not; names the slot, its kind, the mistake and the remedy.
    """
    by_name = {use.slot.name: use for use in uses}
    chains = [_about(use, by_name) for use in by_name.values()]
    for chain in sorted(chains, key=len):  # what others are about first: its faults are its own
        if not own and all(is_own(use.slot.kind) for use in chain):
            continue
        key = _key(chain)
        if key not in _agreed:
            _try(chain, device)
            _agreed.add(key)


def _about(use: Use, by_name: dict[str, Use]) -> list[Use]:
    """A slot, the one that it is about, the one that that is about, and so on."""
    chain = [use]
    while chain[-1].slot.of:
        chain.append(by_name[chain[-1].slot.of])
    return chain


def _key(chain: Sequence[Use]) -> Any:
    """What the way of a slot depends on: not on names."""
    origins = [use.slot.origin for use in chain]
    unnamed = [replace(use.slot, name="", of="", origin=str(origins.index(use.slot.origin))) for use in chain]
    return tuple((type(use.slot.kind), replace(use, slot=slot)) for use, slot in zip(chain, unnamed, strict=True))


def _try(chain: Sequence[Use], device: str) -> None:
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        try:
            example = Example(chain, "cpu")
        except NoExample:
            return  # shapes that no small call has: what a kind makes of them shows in a run
        try:
            return Trial(chain, example).run()
        except SlotKindError as error:
            if device == "cpu" or not isinstance(error.__cause__, NotImplementedError):
                raise
    with torch.no_grad(), torch.device(device), torch.autocast(torch.device(device).type, enabled=False):
        Trial(chain, Example(chain, device)).run()
