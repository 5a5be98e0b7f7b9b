"""The first call of a recording that compiled code makes: what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.runtime.execution.executable import Executable
from tests.support.graph_stand_in import Compiler, patch_cuda
from tests.support.zoo import ZOO

SIZE = (16, 24)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    patch_cuda(monkeypatch, found)
    return found


def record(module: SparseModule) -> Tensor:
    with module.record():
        for seed in range(2):
            found: Tensor = module(**ZOO["plain_conv"]().make_inputs(2, *SIZE, seed))
    return found


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for every call that is interpreted."""
    calls: list[None] = []
    interpret = Executable.interpret

    def counting(self: Executable, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return interpret(self, *arguments, **options)

    monkeypatch.setattr(Executable, "interpret", counting)
    return calls


def test_code_that_rounds_as_it_did_is_compared_with_the_module_instead_of_the_interpreted_graph(
    compiler: Compiler, interpreted: list[None]
) -> None:
    compiler.change = lambda results: [value * (1 + 1e-6) for value in results]
    module = sparsify(ZOO["plain_conv"]().module)
    record(module)
    record(module)
    interpreted.clear()
    outputs = record(module)
    assert not interpreted
    # Closer than ever, as bits that are equal: nothing more is asked.
    compiler.change = lambda results: results
    record(module)
    assert not interpreted
    compiler.change = lambda results: [value * (1 + 1e-5) for value in results]
    again = record(module)
    assert len(interpreted) == 1, "further from the module than rounding was: bits are compared"
    assert_close(again, outputs, torch.float32)


def test_what_a_key_does_not_see_is_found_beside_compiled_code(compiler: Compiler, tmp_path: Path) -> None:
    factor = tmp_path / "factor"
    factor.write_text("1.0")

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, sample: Tensor) -> Tensor:
            found: Tensor = self.conv(sample) * float(factor.read_text())
            return found

    module, sample = sparsify(Reader().eval(), SparsifyConfig(cache=False)), torch.randn(1, 4, *SIZE)
    for _ in range(3):
        with torch.no_grad(), module.record():
            before = module(sample)
    factor.write_text("1.001")
    with torch.no_grad(), module.record() as recording:
        after = module(sample)
    assert recording.complete and torch.equal(after, module.original(sample)) and not torch.equal(after, before)
