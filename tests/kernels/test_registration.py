"""Every op passes ``torch.library.opcheck`` and has a fake that foresees shape and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

from fisedit_compiler.kernels.registry import define_op, registered_ops
from fisedit_compiler.kernels.traits import OpTraits
from tests.kernels.arguments import op_arguments


def test_every_op_is_covered() -> None:
    assert set(op_arguments(3)) == set(registered_ops())


@pytest.mark.parametrize("name", sorted(registered_ops()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(registered_ops()[name].overload, op_arguments(5)[name])


@pytest.mark.parametrize("name", sorted(registered_ops()))
@pytest.mark.parametrize("count", [0, 1, 5])
def test_fake_foresees_shape_dtype_and_strides(name: str, count: int) -> None:
    op, arguments = registered_ops()[name], op_arguments(count)[name]
    results = tree_leaves(op(*arguments))
    with FakeTensorMode() as mode:
        fakes = tree_leaves(op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]))
    for fake, real in zip(fakes, results, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        # The stride of a dimension of size one, or of an empty tensor, addresses nothing.
        if real.numel():
            strides = [(fake.stride(d), real.stride(d)) for d in range(real.dim()) if real.shape[d] > 1]
            assert all(foreseen == found for foreseen, found in strides), strides


def test_fake_keeps_symbolic_sizes() -> None:
    """The number of rows must stay symbolic, or every mask would be compiled anew."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for name, arguments in op_arguments(5).items():
        fakes = [_symbolic(mode, a) if isinstance(a, Tensor) else a for a in arguments]
        with mode:
            *_, out = tree_leaves(registered_ops()[name](*fakes))
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
    assert define_op(op.schema, op.reference, op.fake, traits=OpTraits()) is op


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
        arguments = op_arguments(count)["conv2d_sites"]
        assert torch.equal(compiled(*arguments), conv(*arguments) * 2)
    assert len(graphs) == 1
