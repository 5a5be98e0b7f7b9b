"""A step that cannot be made into code: the error names node, module and line, and nothing runs eagerly in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import LoweringError
from fisedit_compiler.lowering.errors import first_failing, frontier, prefix_of
from tests.support.compiled_zoo import make_mask
from tests.support.graph_stand_in import fake_compile, patch_cuda

aten = torch.ops.aten
SIZE = (8, 8)
SAMPLE = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, *SIZE)
MASK = make_mask("block", SIZE)
REMEDY = (
    'Remedy: SparsifyConfig(backend="eager") runs the same program without compiling it. If the operation is of '
    "another package, give it a fake implementation (torch.library.register_fake) that is right for symbolic sizes."
)


class Gate(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.silu(hidden)


class Model(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.gate = Gate()
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.last(self.gate(self.first(sample)) + 1.0)


def compiled(backend: str = "inductor") -> SparseModule:
    torch.manual_seed(0)
    config = SparsifyConfig(backend=backend, cache=False, dense_above=1.0)  # type: ignore[arg-type]
    return sparsify(Model().eval(), config, example_inputs={"sample": SAMPLE})


def edit(module: SparseModule) -> Tensor:
    with module.record() as recording:
        base = module(sample=SAMPLE)
    changed = torch.where(MASK, SAMPLE + 1, SAMPLE)
    with module.edit(recording, MASK):
        result: Tensor = module(sample=changed)
    assert torch.equal(result[..., ~MASK], base[..., ~MASK])
    return result


def message(module: SparseModule) -> str:
    with pytest.raises(LoweringError) as caught:
        edit(module)
    assert caught.value.__cause__ is not None, "torch's own error, all of it"
    return re.sub(rf"{__file__.rsplit('/', 1)[-1]}:\d+:", "FILE:LINE:", str(caught.value))


def refusing(target: Any, why: str) -> Callable[..., Any]:
    """A torch.compile that cannot compile an operation, and does not say which."""

    def compile_or_refuse(step: fx.GraphModule, **_: Any) -> Callable[..., Any]:
        if any(node.target is target for node in step.graph.nodes):

            def refuse(*arguments: Any) -> Any:
                raise RuntimeError(why)

            return refuse
        return fake_compile(step)

    return compile_or_refuse


def test_inductor_says_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import lowering

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such code for this machine")

    real = torch.compile
    patch_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", real)
    monkeypatch.setitem(lowering.lowerings, aten.sigmoid.default, broken)
    monkeypatch.setitem(lowering.lowerings, aten.exp.default, broken)  # what silu is taken apart into
    with torch._inductor.config.patch(force_disable_caches=True):
        text = message(compiled())
    place = "silu_1 = aten.silu in gate (FILE:LINE: return F.silu(hidden))"
    assert text.startswith(f"The sparse step could not be made into code for this device, at {place}: ")
    assert "no such code for this machine" in text and text.endswith(REMEDY)
    torch._dynamo.reset()


def test_a_node_that_cannot_even_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by running the step node by node: compiling it is not what is wrong."""
    patch_cuda(monkeypatch)
    module = compiled()

    def spoil(step: fx.GraphModule, **options: Any) -> Any:
        node = next(node for node in step.graph.nodes if node.target is aten.silu.default)
        node.args = (node.args[0], "what")
        step.recompile()
        return fake_compile(step, **options)

    monkeypatch.setattr(torch, "compile", spoil)
    assert "at silu_1 = aten.silu in gate (FILE:LINE: return F.silu(hidden)): " in message(module)


def test_an_error_that_says_nothing_is_narrowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    module = compiled()
    monkeypatch.setattr(torch, "compile", refusing(aten.add.Tensor, "kernel 17 is broken"))
    assert message(module) == (
        "The sparse step could not be made into code for this device, at add_1 = aten.add.Tensor in the top module "
        "(FILE:LINE: return self.last(self.gate(self.first(sample)) + 1.0)): RuntimeError: kernel 17 is broken\n"
        + REMEDY
    )


def test_the_module_is_usable_afterwards_and_the_remedy_works(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    module = compiled()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", refusing(aten.add.Tensor, "kernel 17 is broken"))
        for _ in range(2):
            message(module)
    expected = edit(compiled("eager"))
    (executable,) = module._programs.executables()
    executable._pools.clear()  # compiled again, now that it can be
    torch.testing.assert_close(edit(module), expected)


def test_memory_that_runs_out_is_no_fault_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    module = compiled()

    def run(*arguments: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("1 GiB too much")

    monkeypatch.setattr(torch, "compile", lambda step, **_: run)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="1 GiB too much"):
        edit(module)


def test_a_prefix_returns_what_is_read_behind_it() -> None:
    module = compiled("eager")
    (executable,) = module._programs.executables()
    step = executable._graph("step")
    calls = [node for node in step.graph.nodes if node.op == "call_function"]
    for last in calls:
        prefix = prefix_of(step, last)
        names = [node.name for node in prefix.graph.nodes if node.op == "call_function"]
        assert names == [node.name for node in calls[: calls.index(last) + 1]]
        assert len(prefix.graph.output_node().args[0]) == len(frontier(step.graph, last))
    assert first_failing(step, lambda prefix: False) is None
    for wanted in calls:
        found = first_failing(step, lambda prefix, name=wanted.name: any(n.name == name for n in prefix.graph.nodes))
        assert found is wanted
