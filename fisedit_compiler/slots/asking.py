"""Asking a kind of slots: what it raises, and an answer that is none, become an error that names kind, slot and method.

Passes, recordings and checks ask through the methods of ``Slot``, so that no raw error of another package's kind gets
out of the middle of a run.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import sympy
import torch
from torch import Tensor, fx

from fisedit_compiler.errors import SlotKindError
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.written import Written

ANSWERS: dict[str, type] = {
    "store": fx.Node,
    "stored_spec": ValueSpec,
    "load": fx.Node,
    "store_rows": fx.Node,
    "problem": str,
    "row_form": RowForm,
    "written": Written,
    "batch_axes": object,
    "recorded": Tensor,
    "edited": Tensor,
    "read": Tensor,
    "pinned": Tensor,
}
"""What each method of a kind gives. Batch axes are looked at by :func:`_axes_problem`."""

REMEDY = "Mend the kind, or have the rewrite ask for another: Canvas() and Dense() store a value as it is"


class Asked(Protocol):
    """A slot."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Any: ...


def ask(slot: Asked, method: str, *arguments: Any) -> Any:
    """What the kind of a slot answers.

    Raises:
        SlotKindError: it raised, or gave what no such answer can be.
    """
    try:
        answer = getattr(slot.kind, method)(*arguments)
    except SlotKindError:
        raise  # of another slot, which was asked for meanwhile
    except Exception as error:
        refuse(slot, f"{method}() raised {said(error)}", error)
    expected = ANSWERS[method]
    if not isinstance(answer, expected):
        refuse(slot, f"{method}() gave {answer!r}, which is no {expected.__qualname__}")
    graph = arguments[0] if arguments else None
    if isinstance(answer, fx.Node) and isinstance(graph, fx.Graph) and answer.graph is not graph:
        refuse(slot, f"{method}() gave {answer!r}, which is no node of the graph it was given")
    if method == "batch_axes" and (problem := _axes_problem(answer)):
        refuse(slot, f"batch_axes() gave {answer!r}, {problem}")
    if isinstance(answer, ValueSpec) and (problem := _spec_problem(answer)):
        refuse(slot, f"{method}() gave {answer!r}, {problem}")
    return answer


def refuse(slot: Asked, problem: str, error: BaseException | None = None, remedy: str = REMEDY) -> NoReturn:
    """Refuse what the kind of a slot does.

    Raises:
        SlotKindError: always.
    """
    raise SlotKindError(f"Slot {slot.name}, whose kind is {name_of(slot.kind)}: {problem}. {remedy}.") from error


def name_of(kind: Any) -> str:
    """A kind's own name and where it is defined."""
    return f"{kind.name!r} ({type(kind).__module__}.{type(kind).__qualname__})"


def said(error: BaseException) -> str:
    """An error of another package in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _spec_problem(spec: Any) -> str:
    if not isinstance(spec.dtype, torch.dtype):
        return "whose dtype is none"
    if not isinstance(spec.shape, tuple) or not all(isinstance(size, sympy.Expr) for size in spec.shape):
        return "whose shape is no tuple of sympy expressions, such as sympy.Integer(4)"
    return ""


def _axes_problem(answer: Any) -> str:
    if answer is None:
        return ""
    if not isinstance(answer, tuple) or len(answer) != 2:
        return "which is neither None nor two axes, of what is stored and of its rows"
    wrong = [axis for axis in answer if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool))]
    return f"where {wrong[0]!r} is no axis" if wrong else ""
