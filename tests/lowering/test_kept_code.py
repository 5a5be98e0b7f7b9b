"""A later process finds the code of a step again, but not that of another version of the package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fisedit_compiler.kernels import traits
from fisedit_compiler.kernels.gather_taps import gather_taps
from fisedit_compiler.kernels.traits import OpTraits
from fisedit_compiler.lowering.codegen import kept_code
from fisedit_compiler.lowering.codegen.inductor import compile_step
from tests.support.pass_tools import gather_step


def compiled(operands: tuple[Tensor, Tensor]) -> Counter[str]:
    """Compile as a new process would, and run; what caches say of it."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=True, fx_graph_remote_cache=False):
        (result,) = compile_step(gather_step())(*operands)
    assert torch.equal(result, gather_taps(operands[0] * 2, operands[1]) + 1)
    found: Counter[str] = Counter()
    for cache, name in (("inductor", "fxgraph_cache"), ("aot_autograd", "autograd_cache")):
        for outcome in ("hit", "miss", "bypass"):
            found[outcome] += counters[cache][f"{name}_{outcome}"]
    return found


def test_code_is_found_again_by_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    operands = torch.randn(1, 9, 16), torch.randint(0, 9, (5, 4))
    first, second = compiled(operands), compiled(operands)
    assert first["miss"] and not first["hit"] and not first["bypass"]
    assert second["hit"] and not second["miss"] and not second["bypass"]
    monkeypatch.setattr(kept_code, "digest", lambda: "another version")
    other = compiled(operands)
    assert other["miss"] and not other["hit"]


def test_the_digest_is_of_what_ops_are_taken_apart_into() -> None:
    assert len(kept_code._of_this_package()) == 16
    assert kept_code.digest().startswith(kept_code._of_this_package()), "functions of others stand behind it"
    assert all((Path(kept_code.__file__).parents[2] / room).is_dir() for room in kept_code._ROOMS)


def test_the_digest_is_of_what_other_packages_have_in_place_of_their_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_by(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda value: value * factor

    found = [kept_code.digest()]
    for inline in (scaled_by(2.0), scaled_by(2.0), scaled_by(3.0), partial(torch.mul, other=3.0)):
        monkeypatch.setitem(traits.TRAITS, torch.ops.aten.sin.default, OpTraits(inline=inline))
        found.append(kept_code.digest())
    assert found[1] == found[2] and len(set(found)) == 4
