"""Recorded values: what a slot is, and the kinds of slots, one a file.

Importing this room registers the package's own kinds. No other file asks which kind a slot is, and nothing here holds a
recording (``recordings/``). May import ``capture`` and the rooms below.
"""

from fisedit_compiler.slots import canvas, dense, map, site_sums, statistics

__all__ = ["canvas", "dense", "map", "site_sums", "statistics"]
