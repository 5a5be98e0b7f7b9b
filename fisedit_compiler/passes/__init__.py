"""The rewrite passes: each one file in ``rewrites/``, the loop that runs them in ``rewriting.py``.

A graph becomes other graphs here. Nothing runs them, and what is captured stays as it was. May import ``slots`` and the
rooms below.
"""

from __future__ import annotations

from fisedit_compiler.passes.instruments import Instruments, PassReport
from fisedit_compiler.passes.order import REQUIRED, REWRITES, ordered
from fisedit_compiler.passes.rewriting import mark_varying, rewrite

__all__ = ["REQUIRED", "REWRITES", "Instruments", "PassReport", "mark_varying", "ordered", "rewrite"]
