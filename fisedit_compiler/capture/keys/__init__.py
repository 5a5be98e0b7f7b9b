"""What a module is right now: the key its programs and recordings are found by, and a quick look whether it changed.

``structure.py`` reads everything that a forward can read (by ``reader.py``, ``values.py`` and ``functions.py``),
``weights.py`` the contents of parameters and buffers, ``watch.py`` notices changes between two calls, ``model.py`` puts
the three together. ``notes.py`` and ``snapshot.py`` tell what a forward wrote itself. Nothing here runs the module. May
import what the room ``capture`` may.
"""

from fisedit_compiler.capture.keys.model import ModelKey, ModelState
from fisedit_compiler.capture.keys.structure import structure_key

__all__ = ["ModelKey", "ModelState", "structure_key"]
