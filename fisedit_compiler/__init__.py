"""Sparse editing for diffusion models: compute only what a changed prompt touches.

The public surface, nothing else: :func:`sparsify` compiles a module, its ``record()`` and ``edit()`` run it.
"""

import fisedit_compiler.kernels as _kernels  # registers torch.ops.fisedit
from fisedit_compiler.api import sparsify
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.runtime.module import SparseModule
from fisedit_compiler.runtime.recording import Recording

__version__ = "0.1.0"
__all__ = ["Recording", "SparseModule", "SparsifyConfig", "sparsify"]
del _kernels
