"""The kernels that a step will launch are compiled while Inductor makes code of the step: the one needs many cores, the
other a single one.

Inductor has its own kernels compiled by other processes, but knows nothing of those inside this package's ops, which
Triton would compile at their first launches, one after the other. What is launched a traced graph tells (see
``rehearsal.py``). Where that fails, or tells of another launch than is made, the launch compiles as it would have.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.lowering.codegen.rehearsal import rehearse

logger = logging.getLogger(__name__)


@contextmanager
def kernels_ahead(
    inputs: Sequence[Any], besides: Callable[[], None] | None = None
) -> Iterator[Callable[[fx.GraphModule], None]]:
    """Inside the block, the kernels of traced graphs that are handed over are compiled; leaving it waits for them.

    Where no input lies on a CUDA device, or Triton is missing, nothing happens.

    Args:
        inputs: of what is compiled.
        besides: launches other kernels, which are compiled as well.
    """
    ahead = None
    try:
        device = _cuda_device(inputs)
        if device is not None:
            from fisedit_compiler.kernels.triton.ahead import CompiledAhead
            from fisedit_compiler.kernels.triton.launching import noting

            _agree_on_a_folder(device)
            ahead = CompiledAhead()
    except Exception:
        logger.debug("no kernel is compiled ahead", exc_info=True)
    if ahead is None:
        yield lambda graph: None
        return

    def note(launches: Callable[[], None]) -> None:
        try:
            with noting(ahead.add):
                launches()
        except Exception:
            logger.debug("what will be launched cannot be told", exc_info=True)

    with ahead:
        if besides is not None:
            note(besides)
        yield lambda graph: note(lambda: rehearse(graph))


def _cuda_device(inputs: Sequence[Any]) -> torch.device | None:
    """Of the first input that lies on one."""
    if torch.version.hip is not None:  # whose Triton looks at more of a tensor than a note says of it
        return None
    return next((value.device for value in inputs if isinstance(value, Tensor) and value.is_cuda), None)


def _agree_on_a_folder(device: torch.device) -> None:
    """Let Triton keep kernels where Inductor will have it keep them from its first one on, so that a later process that
    begins alike finds all of them."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
