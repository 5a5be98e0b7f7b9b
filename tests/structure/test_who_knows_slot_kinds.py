"""Nobody but a kind of slots asks which kind it is, so that a new one is handled everywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import fisedit_compiler

PACKAGE = Path(fisedit_compiler.__file__).parent


def questions(source: str) -> list[str]:
    """Comparisons with, matches on, and ``isinstance`` of, the kind of a slot."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = node.args[:1]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        for text in map(ast.unparse, asked):
            subject = text.removesuffix(".name")
            if subject.endswith(".kind") and "slot" in subject.lower():
                found.append(ast.unparse(node))
    return found


def test_a_question_is_found() -> None:
    assert questions('x = slot.kind == "canvas"') and questions("x = slots[name].kind.name in KINDS")
    assert questions("isinstance(update.slot.kind, Canvas)") and not questions('layout.kind == "map"')


def test_nobody_asks_which_kind_a_slot_is() -> None:
    asked = {
        f"{path.relative_to(PACKAGE)}: {question}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "slots"
        for question in questions(path.read_text(encoding="utf-8"))
    }
    assert not asked
