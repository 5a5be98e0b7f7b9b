"""Whether what a kind of slots says agrees with itself, tried on a small example.

No kind lives here, and no test of one kind. May import what the room ``slots`` may.
"""

from fisedit_compiler.slots.agreement.check import check_agreement
from fisedit_compiler.slots.agreement.example import Use

__all__ = ["Use", "check_agreement"]
