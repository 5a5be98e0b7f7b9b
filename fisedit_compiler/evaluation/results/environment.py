"""Where an evaluation ran: the machine's parts and the versions its figures depend on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

LIBRARIES = ("fisedit-compiler", "torch", "diffusers", "transformers", "torchmetrics", "scikit-image", "numpy")


def machine(device: str) -> dict[str, str | int]:
    """Processor, cores, and the GPU if the evaluation ran on one. No host name."""
    found: dict[str, str | int] = {"cpu": _cpu_name(), "cores": os.cpu_count() or 1, "device": device}
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_properties(device).name
    return found


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the libraries; those that are not installed as packages are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for library in LIBRARIES:
        try:
            found.setdefault(library, metadata.version(library))
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
