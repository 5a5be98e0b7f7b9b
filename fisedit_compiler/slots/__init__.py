"""Recorded values: what a slot is, and the kinds of slots, one a file.

Importing this room registers the package's own kinds.
"""

from fisedit_compiler.slots import canvas, dense, map, site_sums, statistics

__all__ = ["canvas", "dense", "map", "site_sums", "statistics"]
