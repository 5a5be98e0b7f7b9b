"""A stand-in for a GPU where Triton compiles for one: kernels are compiled for real, and not launched.

Triton needs no GPU to compile. It asks a driver what for, and this one says: for a Hopper. No test lives here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

DEVICE = 97
"""No other test compiles for this one, so kernels that are known for it were compiled here."""


class _Driver:
    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        assert device == DEVICE


class Compilations:
    """What Triton was asked for: names of kernels, with whether they were on disk."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        self.asked.append((src.name, cache_hit))


def compile_without_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, processors: int = 132) -> Compilations:
    """Let launches compile, and launch nothing; what is compiled is kept in a folder."""
    pytest.importorskip("triton.runtime")
    from triton import knobs
    from triton.runtime import JITFunction, driver

    if knobs.runtime.interpret:
        pytest.skip("Triton interprets")
    compilations = Compilations()
    monkeypatch.setattr(driver, "_active", _Driver())
    monkeypatch.setattr(knobs.compilation, "listener", compilations)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def launcher(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: JITFunction.run(kernel, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    return compilations


@contextmanager
def forgotten() -> Iterator[None]:
    """Before and after the block, no kernel knows what was compiled for :data:`DEVICE`."""
    forget()
    try:
        yield
    finally:
        forget()


def forget(device: int = DEVICE) -> None:
    """Let kernels forget what was compiled for a device; on disk it stays."""
    from fisedit_compiler.kernels import triton as room

    for kernel in _kernels(room):
        kernel.device_caches.pop(device, None)


def _kernels(room: Any) -> Iterator[Any]:
    import importlib
    import pkgutil

    from triton.runtime import JITFunction

    for module in pkgutil.iter_modules(room.__path__):
        found = importlib.import_module(f"{room.__name__}.{module.name}")
        yield from (value for value in vars(found).values() if isinstance(value, JITFunction))
