"""``fisedit::gather_taps``: what a convolution reads, gathered through its index table and put side by side.

What a sparse convolution reads lies in one tensor here: the new rows, the recorded ring, a site of zeros
(``conv2d_sites`` describes them). A table of taps makes the left operand of a GEMM, a table of patches makes patches
with their channels last (``geometry/patches.py``). On a GPU a copy at memory bandwidth and the vendor's GEMM were
faster than an implicit GEMM for every shape of a 5 % edit (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from fisedit_compiler.kernels.providers import Provider
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "gather_taps"


def _check(values: Tensor, taps: Tensor) -> None:
    require(
        values.dim() == 3 and taps.dim() == 2,
        _NAME,
        lambda: f"values must be [B, T, C] and taps [N, K], got {values.dim()} and {taps.dim()} dimensions",
    )


def _reference(values: Tensor, taps: Tensor) -> Tensor:
    _check(values, taps)
    batch, _, channels = values.shape
    gathered = values.index_select(1, taps.reshape(-1))
    return gathered.reshape(batch * taps.shape[0], taps.shape[1] * channels)


def _fake(values: Tensor, taps: Tensor) -> Tensor:
    _check(values, taps)
    return values.new_empty(values.shape[0] * taps.shape[0], taps.shape[1] * values.shape[2])


@cache
def _triton() -> Callable[..., Tensor]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.gather_taps import gather_taps

    return gather_taps


def _cuda(values: Tensor, taps: Tensor) -> Tensor:
    _check(values, taps)
    return _triton()(values, taps)


_OP = define_op(
    f"{_NAME}(Tensor values, Tensor taps) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products),
    providers=[Provider("triton", "CUDA", _cuda)],
)


def gather_taps(values: Tensor, taps: Tensor) -> Tensor:
    """Rows of ``values`` side by side, one line per output site or block.

    Args:
        values: ``[B, T, C]``, everything a convolution may read.
        taps: int64 ``[N, K]`` into the ``T`` sites; a patch is a line, too.

    Returns:
        ``[B*N, K*C]``, contiguous, a copy: line ``b*N + n`` is ``values[b, taps[n, 0]], ..., values[b, taps[n, K-1]]``.

    Raises:
        KernelError: a tensor has the wrong number of dimensions.
    """
    return _OP(values, taps)
