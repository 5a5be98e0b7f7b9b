"""A pass of another package fuses what the compiler left apart, before rows are made and after."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler.errors import VerificationError
from fisedit_compiler.extend import Canvas, GraphPass, Pass, Program, Rewriter, spec_of
from tests.support.compiled_zoo import make_mask, record_run
from tests.support.pass_tools import (
    CHANNELS,
    Forward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    example,
    program_of,
    reasons,
)

aten = torch.ops.aten


def gated(node: fx.Node) -> fx.Node | None:
    """``x`` of ``x * sigmoid(x)``."""
    if node.target is not aten.mul.Tensor:
        return None
    for x, gate in (node.args, node.args[::-1]):
        if isinstance(gate, fx.Node) and gate.target is aten.sigmoid.default and gate.args[0] is x:
            return x
    return None


class FuseDense(Pass):
    """``x * sigmoid(x)`` to ``silu(x)`` while both are dense."""

    name = "tests.fuse_dense"
    targets: ClassVar = frozenset({aten.mul.Tensor})
    after: ClassVar = ("convolution",)
    before: ClassVar = ("pointwise",)

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = gated(node)
        if x is not None:
            rewriter.exchange(node, aten.silu.default, (x,))
        return None


class FuseRows(GraphPass):
    """The same on rows."""

    name = "tests.fuse_rows"
    after: ClassVar = ("pointwise",)
    before: ClassVar = ("outputs",)

    def run(self, program: Program) -> None:
        rewriter = Rewriter(program)
        for node in list(program.graph.nodes):
            x = gated(node)
            if x is not None and "layout" not in node.meta:
                rewriter.exchange(node, aten.silu.default, (x,))
        program.graph.eliminate_dead_code()


class Forgetful(FuseDense):
    """Says nothing of where the sites of its own value are."""

    name = "tests.forgetful"

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = gated(node)
        if x is not None:
            fused = rewriter.call(aten.silu.default, (x,), spec_of(node), node)
            node.replace_all_uses_with(fused)
            rewriter.graph.erase_node(node)
        return None


class Refusing(Pass):
    """Has a reason of its own why a running sum stays dense."""

    name = "tests.refusing"
    targets: ClassVar = frozenset({aten.cumsum.default})

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        return "sums run on"


class RefusingToo(Refusing):
    name = "tests.refusing_too"
    after: ClassVar = ("tests.refusing",)


def forward(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return m.second(y * torch.sigmoid(y)) * torch.tanh(x)


def module() -> nn.Module:
    first, second = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
    return Forward(forward, first=first, second=second)


@pytest.mark.parametrize(
    ("extra", "behind", "in_front"),
    [(FuseDense, "convolution", "pointwise"), (FuseRows, "pointwise", "outputs")],
    ids=["dense", "rows"],
)
def test_fused(extra: type[GraphPass], behind: str, in_front: str) -> None:
    compiled = compile_small(module(), extra_passes=[extra], dense_above=1.0)
    names = compiled.stages().names
    assert names.index(behind) < names.index(extra.name) < names.index(in_front)
    program = program_of(compiled)
    after = counts(program.step)
    assert after["aten.silu"] == 1 and "aten.sigmoid" not in after and after["aten.mul.Tensor"] == 1
    assert not program.refusals, program.refusals
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)
    record_run(compiled, example(compiled.original))
    assert compiled.check(make_mask("block", (12, 20))), compiled.check(make_mask("block", (12, 20)))


def test_both_orders_at_once_and_without_them() -> None:
    compiled = compile_small(module(), extra_passes=[FuseRows, FuseDense])
    names = compiled.stages().names
    assert names.index(FuseDense.name) < names.index("pointwise") < names.index(FuseRows.name)
    assert counts(program_of(compile_small(module())).step)["aten.sigmoid"] == 1


def test_a_dense_value_without_a_layout_is_named_with_its_pass() -> None:
    words = r"After pass tests\.forgetful: .*silu.* has no layout: set node\.meta.*Rewriter\.exchange"
    with pytest.raises(VerificationError, match=words):
        compile_small(module(), extra_passes=[Forgetful])


def test_the_reasons_of_all_passes_are_shown() -> None:
    running = Forward(lambda m, x: m.conv(torch.cumsum(x, 2)), conv=nn.Conv2d(CHANNELS, CHANNELS, 1))
    found = reasons(program_of(compile_small(running, extra_passes=[RefusingToo, Refusing])))
    assert "tests.refusing: sums run on; tests.refusing_too: sums run on" in found.values()


@pytest.mark.parametrize("how", ["rows", "canvas", "row_spec", "replace", "slot"])
def test_so_is_one_that_is_asked_for_its_sites_in_the_same_pass(how: str) -> None:
    class Asking(Forgetful):
        name = "tests.asking"

        def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
            made = rewriter.call(aten.silu.default, (node,), spec_of(node), node)
            asked = {
                "rows": lambda: rewriter.rows(made),
                "canvas": lambda: rewriter.canvas(made, "made", node),
                "row_spec": lambda: rewriter.row_spec(made),
                "replace": lambda: rewriter.replace(made, made),
                "slot": lambda: rewriter.slot("made", made, Canvas()),
            }
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
            asked[how]()
            return None

    with pytest.raises(VerificationError, match=r"silu.* is read as a dense value, but it has no layout"):
        compile_small(module(), extra_passes=[Asking])
