"""``compiled.stages()``: the graph after every pass, what changed, and text that a person reads."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import fx, nn

from fisedit_compiler import sparsify
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.listing import listing
from fisedit_compiler.inspect.stages import Stages
from fisedit_compiler.lowering.codegen import inductor
from fisedit_compiler.lowering.codegen.inductor import compile_step
from fisedit_compiler.passes import REWRITES
from fisedit_compiler.passes.instruments import operations
from tests.support.compiled_zoo import compiled_model


@pytest.fixture(scope="module")
def stages() -> Stages:
    return compiled_model("sd15").stages()


def test_there_is_a_stage_for_the_capture_for_every_pass_and_for_each_graph_that_runs(stages: Stages) -> None:
    passes = [rewrite.name for rewrite in REWRITES]
    lowered = [f"{name}_{stage}" for name in ("step", "update") for stage in ("staged", "cut", "repeated")]
    assert stages.names == ["capture", *passes, "lower", "recording", "stores", "update", "step", *lowered]
    assert all(stage.seconds >= 0.0 for stage in stages)
    assert stages["capture"].seconds == compiled_model("sd15").programs[0].seconds["capture"] > 0.0


def test_they_are_what_was_compiled(stages: Stages) -> None:
    program, *_ = compiled_model("sd15").programs
    for name in ("recording", "update", "step"):
        assert [str(node) for node in stages[name].graph.nodes] == [str(n) for n in getattr(program, name).nodes]
    compiled = stages.names[: stages.names.index("step") + 1]
    assert [report.name for report in program.reports][: len(compiled)] == compiled


@pytest.mark.parametrize("name", ["step", "update"])
def test_what_inductor_gets_is_a_stage(name: str, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *_ = compiled_model("sd15").programs
    given: list[fx.GraphModule] = []

    def directly(graph: fx.GraphModule, _: Any) -> Any:
        given.append(graph)
        return lambda: None

    monkeypatch.setattr(inductor, "directly", directly)
    (executable,) = compiled_model("sd15")._programs.executables()
    compile_step(executable._graph_pool(name).step)()
    executable._drop_pools()
    assert listing(given[0].graph) == stages[f"{name}_repeated"].lines
    assert given[0].graph is program.lowered(name)
    assert [report.name for report in program.reports].count(f"{name}_repeated") == 1, "lowered once"
    assert stages[name].source == ("stores" if name == "update" else "lower")
    sources = [stages[f"{name}_{stage}"].source for stage in ("staged", "cut", "repeated")]
    assert sources == [name, f"{name}_staged", f"{name}_cut"]
    staged, cut = (operations(stages[f"{name}_{of}"].graph) for of in ("staged", "cut"))
    assert staged["fisedit.attention_addressed"] == operations(stages[name].graph)["fisedit.attention_sites"] > 0
    assert cut["linear"] == stages[f"{name}_cut"].added["linear"] == staged["aten.linear"] - cut["aten.linear"] > 0
    assert "input(ring_rows, conv_in.input, " in str(stages[f"{name}_staged"])
    assert "-conv2d_sites_default = fisedit.conv2d_sites(" in stages.changes(f"{name}_cut")


def test_graphs_are_copies(stages: Stages) -> None:
    program, *_ = compiled_model("sd15").programs
    assert len({id(stage.graph) for stage in stages}) == len(stages)
    assert all(stage.graph is not program.step for stage in stages)


def test_a_stage_says_what_it_removed_and_added(stages: Stages) -> None:
    convolution = stages["convolution"]
    assert convolution.removed["aten.conv2d"] == operations(stages["capture"].graph)["aten.conv2d"]
    assert convolution.added["fisedit.conv2d_sites"] == operations(convolution.graph)["fisedit.conv2d_sites"] > 0
    for before, after in pairwise(stages[: len(REWRITES) + 1]):
        change = operations(after.graph)
        change.subtract(operations(before.graph))
        told = {**{op: -n for op, n in after.removed.items()}, **after.added}
        assert {op: n for op, n in change.items() if n} == told


def test_a_listing_names_modules_source_lines_layouts_and_shapes(stages: Stages) -> None:
    text = str(stages["group_norm"])
    assert "# down_blocks.0.resnets.0.norm1 | resnet.py:" in text
    assert "self.norm1(hidden_states)" in text
    assert "group_norm_sites_default = fisedit.group_norm_sites(" in text
    assert "# rows [b, n_1, 16] float32" in text and "# map@1 [b, 16, 4*h, 4*w] float32" in text
    printed = io.StringIO()
    stages["group_norm"].print(printed)
    assert printed.getvalue() == text + "\n"


def test_an_excerpt_has_one_module_and_what_is_in_it(stages: Stages) -> None:
    text = stages["capture"].excerpt("down_blocks.0.resnets.0")
    assert text.splitlines()[0].startswith("# down_blocks.0.resnets.0.norm1 | ")
    assert text.count("aten.conv2d(") == 2 and "down_blocks.0.resnets.01" not in text
    assert stages["capture"].excerpt("no.such.module") == ""


def test_every_node_has_its_line(stages: Stages) -> None:
    for stage in stages:
        lines = [line for line in stage.lines if not line.startswith("# ")]
        assert len(lines) == len(stage.graph.nodes)
    assert "active_1 = input(table, active, 1)" in str(stages["step"])


def test_a_difference_shows_what_one_pass_did(stages: Stages) -> None:
    text = stages.changes("merge_linears")
    assert text == stages.diff("rank_change", "merge_linears")
    removed = [line for line in text.splitlines() if line.startswith("-") and "aten.linear" in line]
    added = [line for line in text.splitlines() if line.startswith("+") and "aten.split_with_sizes" in line]
    assert removed and added
    assert stages.changes("capture") == "" == stages.diff("step", "step")
    assert stages.changes("step") == stages.diff("lower", "step"), "not made from the update graph before it"
    assert stages.diff(0, 1) == stages.diff("capture", REWRITES[0].name)


def test_by_name_by_position_and_sliced(stages: Stages) -> None:
    assert stages["capture"] is stages[0] and stages["update_repeated"] is stages[-1]
    assert stages[1:3].names == stages.names[1:3]
    with pytest.raises(KeyError, match=r"'conv' is no stage; the stages are .*convolution"):
        stages["conv"]


def test_the_table_and_the_dictionary(stages: Stages) -> None:
    text = str(stages)
    assert all(name in text for name in stages.names) and "fisedit.conv2d_sites" in text
    rows = stages.to_dict()
    assert [row["name"] for row in rows] == stages.names
    assert [row["source"] for row in rows][:3] == ["", "capture", "extensions"]
    assert rows[0]["nodes"] == len(stages["capture"].graph.nodes)


def test_looking_changes_nothing(stages: Stages) -> None:
    """The program that runs is the same after its stages were made again."""
    program, *_ = compiled_model("sd15").programs

    def now() -> list[tuple[object, ...]]:
        return [(n.name, n.target, n.args) for graph in (program.step, program.recording) for n in graph.nodes]

    before = now()
    compiled_model("sd15").stages()
    assert now() == before
    assert not any(node.target in ir.MARKERS for node in program.step.nodes)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="Nothing is compiled yet: record a call, or pass example_inputs"):
        sparsify(nn.Conv2d(3, 3, 1).eval()).stages()
    with pytest.raises(ConfigError, match="There are 1 programs, one per call signature; 4 is none of them"):
        compiled_model("sd15").stages(program=4)


def test_an_argument_of_every_kind_is_written_as_code() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.to.dtype, (x, torch.float16))
    graph.call_function(torch.ops.aten.cat.default, ([x, x],), {"dim": 1})
    assert listing(graph) == [
        "x = input('x')",
        "to_dtype = aten.to.dtype(x, float16)",
        "cat_default = aten.cat([x, x], dim=1)",
    ]
