"""From which area on a dense call is faster than a sparse one: measured figures, kept as data.

The figures are in ``break_even.json`` beside this file, each with what it was measured from. ``python -m
benchmarks.break_even`` fits them again from the step latency benchmark's reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

from fisedit_compiler.config import RunsOn

FILE = "break_even.json"
NEVER = 1.0


@cache
def figures() -> Mapping[tuple[str, str], float]:
    """Measured break-evens by ``(device type, backend)``, each a share of active sites in [0, 1]."""
    text = (resources.files(__package__) / FILE).read_text(encoding="utf-8")
    return {(entry["device"], entry["backend"]): float(entry["break_even"]) for entry in json.loads(text)["figures"]}


def break_even(device_type: str, backend: RunsOn) -> float:
    """Share of active sites above which a dense call is faster than a sparse one.

    Args:
        device_type: ``torch.device.type``, such as ``"cpu"``.
        backend: what the sparse step runs on there (:meth:`SparsifyConfig.backend_on`).

    Returns:
        The measured share, or :data:`NEVER` (1.0) for a pair that nobody measured.
    """
    return figures().get((device_type, backend), NEVER)
