"""``fisedit::attention_addressed``: ``attention_sites`` inside a CUDA graph that is replayed for many recordings.

A graph's inputs stay where they were, and the keys and values of a call are hundreds of megabytes: instead of being
copied to one place they are found through a table of addresses, which is what changes between two replays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import tensor_at
from fisedit_compiler.kernels.attention_sites import OP as ATTENTION_SITES
from fisedit_compiler.kernels.formulas import canvas_attention_flops
from fisedit_compiler.kernels.providers import Provider
from fisedit_compiler.kernels.registry import define_op
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "attention_addressed"


def _reference(
    query: Tensor, key: Tensor, value: Tensor, key_canvas: Tensor, value_canvas: Tensor, active: Tensor,
    inverse: Tensor, addresses: Tensor, key_entry: int, value_entry: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    key_canvas = tensor_at(int(addresses[key_entry]), key_canvas)
    value_canvas = tensor_at(int(addresses[value_entry]), value_canvas)
    return ATTENTION_SITES.reference(query, key, value, key_canvas, value_canvas, active, scale, inverse)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, key_canvas: Tensor, value_canvas: Tensor, active: Tensor,
    inverse: Tensor, addresses: Tensor, key_entry: int, value_entry: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    return ATTENTION_SITES.fake(query, key, value, key_canvas, value_canvas, active, scale, inverse)


@cache
def _triton() -> Callable[..., Tensor]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites

    return attention_sites


def _cuda(
    query: Tensor, key: Tensor, value: Tensor, key_canvas: Tensor, value_canvas: Tensor, active: Tensor,
    inverse: Tensor, addresses: Tensor, key_entry: int, value_entry: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    return _triton()(
        query, key, value, key_canvas, value_canvas, active, inverse, scale,
        addresses=addresses, entries=(key_entry, value_entry),
        # Tensor cores would round float32 to tf32; torch's attention does not.
        merged=None if query.dtype in (torch.float16, torch.bfloat16) else True,
    )  # fmt: skip


_OP = define_op(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, Tensor key_canvas, Tensor value_canvas, Tensor active, "
    "Tensor inverse, Tensor addresses, int key_entry, int value_entry, float? scale=None) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=canvas_attention_flops, reads_whole=True),
    providers=[Provider("triton", "CUDA", _cuda)],
)


def attention_addressed(
    query: Tensor, key: Tensor, value: Tensor, key_canvas: Tensor, value_canvas: Tensor, active: Tensor,
    inverse: Tensor, addresses: Tensor, key_entry: int, value_entry: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """:func:`attention_sites` whose canvases are found through a table of addresses.

    Args:
        query: active rows ``[B, h, N, d]``; ``key`` and ``value`` likewise.
        key: see ``query``.
        value: see ``query``.
        key_canvas: recorded keys ``[B, h, S, d]``: shape and strides count; their address is in the table.
        value_canvas: recorded values, likewise.
        active: int64 ``[N]``, where in the canvases the rows belong.
        inverse: ``inverse_table(active, S)``.
        addresses: int64 ``[A]`` on the device. Entries must be the canvases' addresses when the op runs; a CUDA graph
            reads them at every replay, so the canvases may be others then (of equal layout, 16-byte aligned).
        key_entry: the keys' entry in the table.
        value_entry: the values' entry in the table.
        scale: factor of the logits, ``1 / sqrt(d)`` if ``None``.

    Returns:
        ``[B, h, N, d]``, laid out in memory as ``[B, N, h, d]``.
    """
    return _OP(
        query, key, value, key_canvas, value_canvas, active, inverse, addresses, key_entry, value_entry, scale
    )  # fmt: skip
