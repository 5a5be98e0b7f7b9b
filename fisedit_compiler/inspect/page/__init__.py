"""``fisedit inspect``: one page that shows what the compiler made of a model. Opens in a browser without a network.

The facts come from ``inspect``; here they are only drawn. May import what the room ``inspect`` may.
"""

from __future__ import annotations

from fisedit_compiler.inspect.page.build import build_page
from fisedit_compiler.inspect.page.drawing import draw_program

__all__ = ["build_page", "draw_program"]
