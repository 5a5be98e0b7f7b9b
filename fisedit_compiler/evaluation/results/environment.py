"""Where figures were taken: the machine's parts and the versions they depend on; of evaluations and of benchmarks."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = ("fisedit-compiler", "torch", "diffusers", "transformers", "torchmetrics", "scikit-image", "numpy")


def machine(device: torch.device | str) -> dict[str, str | int]:
    """Processor, cores, and the GPU if the figures were taken on one. No host name: the parts are what matters."""
    found: dict[str, str | int] = {"cpu": _cpu_name(), "cores": os.cpu_count() or 1, "device": str(device)}
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_properties(device).name
    return found


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python, CUDA and the libraries; those that are not installed as packages are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for library in libraries:
        try:
            found.setdefault(library, metadata.version(library))
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
