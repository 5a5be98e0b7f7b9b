"""Every op passes ``torch.library.opcheck`` and has a fake that foresees shape and strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fisedit_compiler.kernels import registered_ops
from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.attention_sites import inverse_table
from fisedit_compiler.kernels.registry import define_op
from tests.kernels.tables import Geometry, brute_force_taps, pick


def _arguments(count: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op on a 4x6 lattice with ``count`` active sites."""
    active = pick(24, count)
    ring, taps = brute_force_taps(Geometry(4, 6), active, active)
    places, options = torch.arange(count), ((3, 3), (1, 1), (1, 1))
    x, statistics = torch.randn(2, 8, 4, 6), torch.rand(2, 4, 2)
    rows, canvas = torch.randn(2, count, 8), torch.randn(2, 24, 8)
    heads, head_canvas = torch.randn(2, 2, count, 8), torch.randn(2, 2, 24, 8)
    text, recorded = torch.randn(2, 2, 7, 8), torch.rand(2, 2, count, 9)
    columns = torch.tensor([[0, 1, -1, 8, -1, 2, 3]] * 2)
    return {
        "conv2d_sites": (rows, canvas, ring, taps, places, torch.randn(7, 72), torch.randn(7), *options),
        "convolve": (canvas, taps, places, torch.randn(7, 72), torch.randn(7), *options),
        "convolve_parts": (canvas, taps, places, torch.randn(7, 72), 3, *options),
        "matmul_parts": (torch.randn(count, 8), torch.randn(7, 8), 4),
        "pack_conv_weight": (torch.randn(5, 4, 3, 3),),
        "group_norm_statistics": (x, 4),
        "group_norm_site_sums": (x, statistics, 4),
        "update_statistics": (rows, statistics, torch.randn(2, 24, 4, 2), active),
        "group_norm_sites": (rows, statistics, torch.randn(8), torch.randn(8), 4, 1e-5),
        "attention_sites": (heads, heads, heads, head_canvas, head_canvas, active, None),
        "attention_rows": (heads, heads, heads, active),
        "cross_attention": (heads, text, text),
        "attention_map": (heads, text, None, recorded, columns),
        "attention_with_map": (heads, text, text, recorded, columns),
        "attention_addressed": (
            heads,
            heads,
            heads,
            head_canvas,
            head_canvas,
            active,
            inverse_table(active, 24),
            address_table([head_canvas], torch.device("cpu")),
            0,
            0,
        ),
        "gather_taps": (canvas, taps),
        "gather_sites": (canvas, active, 1),
        "scatter_sites": (rows, canvas, active, 1),
        "recentre_site_sums": (torch.randn(2, 24, 4, 2), statistics, torch.rand(2, 4, 2), 8),
    }


def test_every_op_is_covered() -> None:
    assert set(_arguments(3)) == set(registered_ops())


@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(registered_ops()[name].overload, _arguments(5)[name])


@pytest.mark.parametrize("name", sorted(registered_ops()))
@pytest.mark.parametrize("count", [0, 1, 5])
def test_fake_foresees_shape_dtype_and_strides(name: str, count: int) -> None:
    op, arguments = registered_ops()[name], _arguments(count)[name]
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    # The stride of a dimension of size one, or of an empty tensor, addresses nothing.
    if real.numel():
        strides = [(fake.stride(d), real.stride(d)) for d in range(real.dim()) if real.shape[d] > 1]
        assert all(foreseen == found for foreseen, found in strides), strides


def test_fake_keeps_symbolic_sizes() -> None:
    """The number of rows must stay symbolic, or every mask would be compiled anew."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for name, arguments in _arguments(5).items():
        fakes = [_symbolic(mode, a) if isinstance(a, Tensor) else a for a in arguments]
        with mode:
            out = registered_ops()[name](*fakes)
        if name not in ("group_norm_statistics", "update_statistics"):
            assert any(isinstance(size, torch.SymInt) for size in out.shape), name
    assert mode.shape_env is not None
    pinned = {s: v for s, v in mode.shape_env.replacements.items() if v.is_number}
    assert not pinned, f"sizes fixed by a fake: {pinned}"


def _symbolic(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake whose batch and site counts (the sizes that are not channels or groups) are symbolic."""
    dynamic = {2, 24, 5, 6}
    sizes = [DimDynamic.DYNAMIC if size in dynamic else DimDynamic.STATIC for size in tensor.shape]
    if tensor.dim() >= 2 and tensor.shape[-1] in (2, 5):
        sizes[-1] = DimDynamic.STATIC
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def test_defining_twice_keeps_the_first() -> None:
    op = registered_ops()["gather_sites"]
    assert define_op(op.schema, op.reference, op.fake) is op


def test_compiled_once_for_every_number_of_rows() -> None:
    """A changed mask must not recompile."""
    conv = registered_ops()["conv2d_sites"].overload
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: conv(*a) * 2, backend=backend, fullgraph=True, dynamic=True)
    for count in (3, 5, 11):
        arguments = _arguments(count)["conv2d_sites"]
        assert torch.equal(compiled(*arguments), conv(*arguments) * 2)
    assert len(graphs) == 1
