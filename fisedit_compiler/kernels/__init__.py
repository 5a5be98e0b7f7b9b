"""The ops of the sparse program, one per file; importing this package registers ``torch.ops.fisedit``.

An op is what it means, its traits and its kernels. When it is used is for the passes to say. May import ``geometry``
and the rooms below.
"""

from __future__ import annotations

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    if not _file.ispkg:  # kernels for a kind of device are imported where they are called first
        importlib.import_module(f"{__name__}.{_file.name}")
