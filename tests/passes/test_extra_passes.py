"""Passes of a user's own: where they run among the package's, and orders that cannot be."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.extend import (
    GraphPass,
    Pass,
    Program,
)
from fisedit_compiler.passes.order import REWRITES, ordered
from tests.support.pass_tools import CHANNELS, Forward, assert_equals_oracle, compile_small

NAMES = [rewrite.name for rewrite in REWRITES]


class CountSilus(GraphPass):
    """Looks, changes nothing."""

    name = "count_silus"
    after: ClassVar = ("convolution",)
    before: ClassVar = ("pointwise",)
    seen: ClassVar[list[int]] = []

    def run(self, program: Program) -> None:
        self.seen.append(sum(node.target is torch.ops.aten.silu.default for node in program.graph.nodes))


def named(name: str, after: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> type[GraphPass]:
    return type(name, (CountSilus,), {"name": name, "after": after, "before": before})


def test_an_extra_pass_runs_in_its_place() -> None:
    CountSilus.seen.clear()
    silu = Forward(lambda self, x: self.conv(torch.nn.functional.silu(x)), conv=nn.Conv2d(CHANNELS, CHANNELS, 1))
    compiled = compile_small(silu, extra_passes=[CountSilus])
    assert CountSilus.seen == [1]
    names = compiled.stages().names
    assert names[names.index("count_silus") - 1] == "convolution"
    assert_equals_oracle(compiled)


@pytest.mark.parametrize(
    ("after", "before", "follows"),
    [
        ((), (), NAMES[-2]),
        (("view",), (), "view"),
        (("view", "convolution"), ("outputs",), "view"),
        ((), ("group_norm",), "upsample"),
        ((), ("extensions",), None),
    ],
)
def test_where_it_comes(after: tuple[str, ...], before: tuple[str, ...], follows: str | None) -> None:
    names = [rewrite.name for rewrite in ordered([named("mine", after, before)])]
    assert [name for name in names if name != "mine"] == NAMES
    position = names.index("mine")
    assert (names[position - 1] if position else None) == follows


def test_extra_passes_may_name_each_other() -> None:
    names = [p.name for p in ordered([named("second", ("first",)), named("first", ("view",))])]
    assert names[names.index("view") :][:3] == ["view", "first", "second"]


def test_extra_passes_may_say_the_same_twice() -> None:
    names = [p.name for p in ordered([named("second", ("first",)), named("first", (), ("second",))])]
    assert names[-3:] == ["first", "second", "outputs"]


def test_extra_passes_of_one_place_stand_as_they_are_given() -> None:
    extra = [named("one", ("view",)), named("two", (), ("permute",)), named("three", ("view",))]
    names = [p.name for p in ordered(extra)]
    assert names[names.index("view") :][:5] == ["view", "one", "two", "three", "permute"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([named("mine", ("outputs",))], r"'mine' of extra_passes cannot come after \['outputs'\] and before"),
        ([named("mine", ("pointwise",), ("convolution",))], "cannot come after"),
        ([named("mine", ("nothing",))], "'mine' is ordered by 'nothing', which is no pass"),
        ([named("view")], "called 'view' like another"),
        ([named("mine"), named("mine")], "called 'mine' like another"),
        ([named("one", ("two",)), named("two", ("one",))], "wait for each other"),
        ([CountSilus()], "which is no subclass of fisedit_compiler.extend.Pass"),
        ([named("")], "has no `name`"),
        ([type("Empty", (GraphPass,), {"name": "mine"})], r"Empty of extra_passes does nothing: define run\(\)"),
        ([type("Empty", (Pass,), {"name": "mine"})], r"does nothing: define rewrite\(\)"),
        (
            [type("Blind", (Pass,), {"name": "mine", "rewrite": lambda self, node, rewriter: None})],
            "looks for no operation: name them in `tar",
        ),
        ([named("one", ("view",), ("two",)), named("two", (), ("convolution",))], "'one' .*, and 'two' .* cannot come"),
    ],
)
def test_orders_that_cannot_be(extra: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ordered(extra)


def test_an_extra_pass_is_part_of_what_a_recording_is_made_for() -> None:
    config = SparsifyConfig(extra_passes=[CountSilus])  # type: ignore[arg-type]
    assert config.extra_passes == (CountSilus,)
    assert config.program_key() != SparsifyConfig().program_key()
    assert hash(config) != hash(SparsifyConfig())


def test_an_extra_pass_can_be_disabled() -> None:
    assert CountSilus not in ordered([CountSilus], {"count_silus"})
