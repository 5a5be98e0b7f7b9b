"""The ops of the sparse program, one per file; importing this package registers ``torch.ops.fisedit``."""

from __future__ import annotations

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    if not _file.ispkg:  # kernels for a kind of device are imported where they are called first
        importlib.import_module(f"{__name__}.{_file.name}")
