"""Pairs and tiny pipelines for the tests of evaluations; fixtures are in ``conftest.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

STEPS = 6

PAIRS = [
    {"input": "a cat, red background", "edit": "dog", "output": "a dog, red background", "region": [0, 0, 1, 1]},
    {"input": "a cat", "edit": "fox", "output": "a fox", "seed": 5, "kind": "object", "region": [0.0, 0.0, 1.0, 0.5]},
    {"input": "a cat, desert", "edit": "ocean", "output": "a cat, ocean", "kind": "background"},
]


def _tiny_pipelines() -> ModuleType:
    """The pipelines' tests have a tiny pipeline and a stand-in for the compiled UNet already."""
    path = Path(__file__).resolve().parents[1] / "pipelines" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_pipelines = _tiny_pipelines()
