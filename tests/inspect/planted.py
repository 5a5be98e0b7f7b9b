"""Bugs to plant, one per rewrite pass: each spoils what the pass wrote for a single node of the user's model.

A plant wraps the pass's ``run``; what it leaves keeps every invariant of the verifier, so nothing but a comparison of
values can find it. The tests of ``check`` and of ``bisect`` share them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.passes.base import Program, Rewriter
from fisedit_compiler.passes.order import REWRITES
from fisedit_compiler.passes.rewrites.extensions import RULES
from tests.support.compiled_zoo import zoo_model
from tests.support.pass_tools import CHANNELS, Forward, compile_small

aten = torch.ops.aten
fisedit = torch.ops.fisedit


@torch.library.custom_op("fisedit_tests::third", mutates_args=())
def third(tokens: Tensor) -> Tensor:
    return tokens / 3


@third.register_fake
def _(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens)


THIRD = torch.ops.fisedit_tests.third.default


def third_on_rows(node: fx.Node, rewriter: Rewriter) -> str | None:
    """A right rule."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rewriter.replace(node, rewriter.call(THIRD, (rewriter.rows(source),), rewriter.row_spec(node), node))
    return None


@pytest.fixture
def rule() -> Iterator[None]:
    """The rule is registered while a test runs."""
    before = dict(RULES)
    RULES[THIRD] = third_on_rows
    yield
    RULES.clear()
    RULES.update(before)


def unet(name: str = "sd21", **options: Any) -> SparseModule:
    return sparsify(zoo_model(name).module, SparsifyConfig(**options))


@cache
def _one_level_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=24,
            use_linear_projection=True,
        )
    return module.eval().requires_grad_(False)


def one_level() -> SparseModule:
    """A UNet with every kind of operation, of one level only: a third of the nodes, compiled again in every trial."""
    return sparsify(_one_level_module(), SparsifyConfig())


def small(function: Callable[..., Tensor], multiple: int = 1, **options: Any) -> SparseModule:
    layers = {name: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for name in ("conv", "out")}
    return compile_small(Forward(function, **layers), multiple, **options)


def with_extension() -> SparseModule:
    return small(lambda self, x: self.out(torch.ops.fisedit_tests.third(self.conv(x))))


def with_upsampling() -> SparseModule:
    return small(lambda self, x: self.out(F.silu(F.interpolate(self.conv(F.avg_pool2d(x, 2)), scale_factor=2.0))), 2)


def with_slice() -> SparseModule:
    return small(lambda self, x: self.out(torch.cat([self.conv(x)[:, 2:6], self.conv(x)[:, :4]], 1)))


def with_new_axis() -> SparseModule:
    return small(lambda self, x: self.out((self.conv(x).unsqueeze(1) * 2.0).squeeze(1)))


def with_dense_end() -> SparseModule:
    return small(lambda self, x: torch.cumsum(self.conv(x), -1))


Spoil = Callable[[fx.Node], None]


def set_argument(position: int, value: Any) -> Spoil:
    def spoil(node: fx.Node) -> None:
        args = list(node.args)
        args[position] = value
        node.args = tuple(args)

    return spoil


def reversed_argument(position: int, axis: int) -> Spoil:
    """One operand, its elements in reverse order along an axis."""

    def spoil(node: fx.Node) -> None:
        operand = node.args[position]
        assert isinstance(operand, fx.Node)
        with node.graph.inserting_before(node):
            flipped = ir.call(node.graph, aten.flip.default, (operand, [axis]), spec=spec_of(operand))
        flipped.meta["varies"] = True
        set_argument(position, flipped)(node)

    return spoil


def reversed_result(axis: int) -> Spoil:
    """The result, its elements in reverse order along an axis, stands for the dense node."""

    def spoil(node: fx.Node) -> None:
        with node.graph.inserting_after(node):
            flipped = ir.call(node.graph, aten.flip.default, (), spec=spec_of(node), source=node)
        node.replace_all_uses_with(flipped)
        flipped.args = (node, [axis])
        flipped.meta.update(varies=True, stands_for=node.meta.pop("stands_for"))

    return spoil


def swapped_inputs(node: fx.Node) -> None:
    first, second = node.args[0]  # type: ignore[misc,union-attr]
    node.args = ([second, first], *node.args[1:])


def other_part(node: fx.Node) -> None:
    node.args = (node.args[0], 1 - int(node.args[1]))  # type: ignore[arg-type]


def next_channels(node: fx.Node) -> None:
    x, axis, start, end, *rest = node.args
    node.args = (x, axis, int(start) + 1, int(end) + 1, *rest)  # type: ignore[arg-type]


def other_function(target: Any) -> Spoil:
    def spoil(node: fx.Node) -> None:
        node.target = target

    return spoil


@dataclass
class Plant:
    """One bug.

    Attributes:
        name: of the pass.
        build: makes a module whose program has what is spoiled.
        target: operation of the node that the pass wrote and the bug spoils.
        spoil: changes that node in place.
        part_of: for ``getitem`` nodes, the operation that they take a part of.
        nth: which of these nodes.
        origins: captured nodes that the last spoiled rows stand for.
    """

    name: str
    build: Callable[[], SparseModule]
    target: Any
    spoil: Spoil
    part_of: Any = None
    nth: int = 0
    origins: tuple[str, ...] = field(default=(), init=False)

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Spoil what the pass writes from now on."""
        rewrite = next(p for p in REWRITES if p.name == self.name)
        original = rewrite.run

        def run(pass_: Any, program: Program) -> None:
            known = set(program.graph.nodes)
            original(pass_, program)
            written = [node for node in program.graph.nodes if node not in known and self._is_target(node)]
            self.origins = written[self.nth].meta["stands_for"]
            self.spoil(written[self.nth])

        monkeypatch.setattr(rewrite, "run", run)

    def _is_target(self, node: fx.Node) -> bool:
        if node.target is not self.target or "stands_for" not in node.meta:
            return False
        return self.part_of is None or node.args[0].target is self.part_of  # type: ignore[union-attr]


PLANTS = [
    Plant("extensions", with_extension, THIRD, other_function(aten.relu.default)),
    Plant("convolution", one_level, fisedit.conv2d_sites.default, set_argument(6, None), nth=3),
    Plant("upsample", with_upsampling, fisedit.gather_sites.default, reversed_argument(1, 0)),
    Plant("group_norm", one_level, fisedit.group_norm_sites.default, reversed_argument(1, 2), nth=2),
    Plant("self_attention", one_level, fisedit.attention_sites.default, set_argument(6, 0.1), nth=1),
    Plant("cross_attention", one_level, fisedit.cross_attention.default, set_argument(3, 0.1), nth=1),
    Plant("concatenation", with_slice, aten.cat.default, swapped_inputs),
    Plant("split", one_level, operator.getitem, other_part, part_of=aten.chunk.default, nth=1),
    Plant("channel_axis", with_slice, aten.slice.Tensor, next_channels),
    Plant("rowwise", one_level, aten.layer_norm.default, set_argument(4, 0.5), nth=2),
    Plant("pointwise", one_level, aten.silu.default, other_function(aten.relu.default), nth=4),
    Plant("view", one_level, aten.reshape.default, reversed_result(2), nth=3),
    Plant("permute", one_level, aten.permute.default, reversed_result(1), nth=3),
    Plant("rank_change", with_new_axis, aten.unsqueeze.default, reversed_result(-1)),
    Plant("merge_linears", one_level, operator.getitem, other_part, part_of=aten.split_with_sizes.default, nth=1),
]
