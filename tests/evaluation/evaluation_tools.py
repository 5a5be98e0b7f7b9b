"""Pairs for the tests of evaluations; fixtures are in ``conftest.py``."""

from __future__ import annotations

STEPS = 6

PAIRS = [
    {"input": "a cat, red background", "edit": "dog", "output": "a dog, red background", "region": [0, 0, 1, 1]},
    {"input": "a cat", "edit": "fox", "output": "a fox", "seed": 5, "kind": "object", "region": [0.0, 0.0, 1.0, 0.5]},
    {"input": "a cat, desert", "edit": "ocean", "output": "a cat, ocean", "kind": "background"},
]
