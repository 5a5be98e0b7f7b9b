"""``fisedit::gather_taps``: the left operand of a convolution's GEMM, gathered through its table of taps.

What a sparse convolution reads lies in one tensor here: the new rows, the recorded ring, a site of zeros
(``conv2d_sites`` describes them). Only compiled GPU steps use the op by itself: there a copy at memory bandwidth and
the vendor's GEMM were faster than an implicit GEMM for every shape of a 5 % edit (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, provide, require

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


_OP = define_op(f"{_NAME}(Tensor values, Tensor taps) -> Tensor", _reference, _fake)


def _cuda(values: Tensor, taps: Tensor) -> Tensor:
    _check(values, taps)
    from fisedit_compiler.kernels.triton.gather_taps import gather_taps as kernel

    return kernel(values, taps)


provide(_NAME, "CUDA", _cuda)


def gather_taps(values: Tensor, taps: Tensor) -> Tensor:
    """Rows of ``values`` side by side, one line per output site.

    Args:
        values: ``[B, T, C]``, everything a convolution may read.
        taps: int64 ``[N, K]`` into the ``T`` sites.

    Returns:
        ``[B*N, K*C]``, contiguous, a copy: line ``b*N + n`` is ``values[b, taps[n, 0]], ..., values[b, taps[n, K-1]]``.

    Raises:
        KernelError: a tensor has the wrong number of dimensions.
    """
    return _OP(values, taps)
