"""What the command ``fisedit compile`` does: compile a pipeline's UNet, and leave it on disk for other processes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fisedit_compiler.capture import cache
from fisedit_compiler.errors import ConfigError, FiseditError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Compiled:
    """What was made.

    Attributes:
        lowered: whether there is code for the device, or only the program.
        seconds: all of it took.
        folders: where it lies, by what it is.
    """

    lowered: bool
    seconds: float
    folders: dict[str, Path]


def compile_model(
    model: Path | None,
    *,
    size: tuple[int, int] | None = None,
    guidance: bool = True,
    device: str = "cpu",
    dtype: str | None = None,
    progress: bool = True,
) -> Compiled:
    """Compile a pipeline ahead of its first use.

    Args:
        model: directory in diffusers layout; the embedded model if ``None``.
        size: height and width of the pictures to come, in pixels; the model's own if ``None``.
        guidance: whether they will be made with guidance, which doubles the batch.
        device: where they will be made.
        dtype: of the weights, a key of :data:`DTYPES`; float16 on a GPU and float32 elsewhere if ``None``.
        progress: whether bars are shown.

    Raises:
        ModelNotFoundError: the directory holds no pipeline.
        ConfigError: the dtype is unknown, or the model takes no pictures of this size.
        FiseditError: the model cannot be compiled, or nothing can be kept on disk.
    """
    from fisedit_compiler.models import load_pipeline
    from fisedit_compiler.pipelines import Editor

    dtype = dtype or ("float16" if torch.device(device).type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise ConfigError(f"{dtype!r} is no dtype of weights; name one of {', '.join(DTYPES)}")
    captures = cache.directory()
    _check_writable(captures)
    started = time.perf_counter()
    height, width = size or (None, None)
    with Editor(load_pipeline(model, device=device, dtype=DTYPES[dtype]), progress=progress) as editor:
        editor.prepare(height=height, width=width, guidance_scale=5.0 if guidance else 1.0)
        backends = [one.backend.on(torch.device(device)) for one in editor.compiled._programs.executables()]
        lowered = "inductor" in backends
    folders = {"graphs": captures}
    if lowered:
        folders["code"] = _inductor_folder()
    return Compiled(lowered, time.perf_counter() - started, folders)


def _inductor_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FiseditError(
            f"nothing can be kept in {str(folder)!r} ({error.strerror}); name another folder in FISEDIT_CACHE_DIR"
        ) from error
    if not os.access(folder, os.W_OK):
        raise FiseditError(f"{str(folder)!r} cannot be written to; name another folder in FISEDIT_CACHE_DIR")
