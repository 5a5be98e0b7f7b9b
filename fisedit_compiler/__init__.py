"""Sparse editing for diffusion models: compute only what a changed prompt touches.

The public surface, nothing else: :func:`sparsify` compiles a module, its ``record()`` and ``edit()`` run it, and
``Editor`` does all of it on a diffusers pipeline.
"""

from typing import TYPE_CHECKING, Any

import fisedit_compiler.kernels as _kernels  # registers torch.ops.fisedit
from fisedit_compiler.api import sparsify
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.module import SparseModule
from fisedit_compiler.recordings.recording import Recording

if TYPE_CHECKING:
    from fisedit_compiler.pipelines import Editor

__version__ = "0.1.0"
__all__ = ["Editor", "Recording", "SparseModule", "SparsifyConfig", "sparsify"]
del _kernels


def __getattr__(name: str) -> Any:
    # Editor brings diffusers along, which takes seconds and which a bare torch module does not need.
    if name == "Editor":
        from fisedit_compiler.pipelines import Editor

        return Editor
    if name == "dynamo":  # and this one Dynamo, which only torch.compile needs
        import fisedit_compiler.dynamo

        return fisedit_compiler.dynamo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
