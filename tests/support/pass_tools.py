"""What the tests of single passes share: compiling a module of a few lines, counting operations, asking the oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.capture.arguments import sign
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.capture.export import capture
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import Sources, graph_inputs, resolve
from fisedit_compiler.graph.ir import copy_graph
from fisedit_compiler.graph.layout_rules import LayoutRules
from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.passes import mark_varying
from fisedit_compiler.passes.base import Program
from fisedit_compiler.passes.simplify import simplify
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.execution.padded_plans import bucket
from tests.reference.pinned import PinnedRun
from tests.support.compiled_zoo import (
    BaseRun,
    active_sets,
    base_run,
    compiled_model,
    edit_inputs,
    edited,
    make_mask,
    output_of,
    record_run,
)

Size = tuple[int, int]
CHANNELS = 8
TEXT_TOKENS = 5


class Forward(nn.Module):
    """A module from a function of ``(module, sample[, text])`` and its layers."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, sample: Tensor) -> Any:
        return self.function(self, sample)


class TextForward(Forward):
    """As :class:`Forward`, with a second input that has no sites."""

    def forward(self, sample: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, sample, text)


def example(module: nn.Module, batch: int = 2, size: Size = (12, 20), seed: int = 0) -> dict[str, Any]:
    """Inputs of a small module: ``sample [B, 8, H, W]`` and, where it takes one, ``text [B, 5, 8]``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"sample": torch.randn(batch, CHANNELS, *size, generator=generator)}
    if isinstance(module, TextForward):
        inputs["text"] = torch.randn(batch, TEXT_TOKENS, CHANNELS, generator=generator)
    return inputs


def compile_small(module: nn.Module, multiple: int = 1, **options: Any) -> SparseModule:
    """``sparsify`` without a disk cache; weights get a spread, so that no forgotten bias goes unseen."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)
    config = SparsifyConfig(cache=False, multiple=multiple, **options)
    return sparsify(module.eval().requires_grad_(False), config, example_inputs=example(module))


def program_of(compiled: SparseModule) -> CompiledProgram:
    """The one program of a compiled module."""
    (program,) = compiled.programs
    return program


def counts(graph: fx.Graph) -> Counter[str]:
    """Call nodes of a graph by readable operation name."""
    return Counter(ir.target_name(node.target) for node in graph.nodes if node.op == "call_function")


def reasons(program: CompiledProgram) -> dict[str, str]:
    """Why operations stay dense, by operation."""
    return {operation: reason for _, _, operation, reason in program.refusals}


def assert_equals_oracle(
    compiled: SparseModule,
    pin_inputs_of: Collection[str] = (),
    *,
    masks: Collection[str] = ("site", "scattered", "block", "border"),
    size: Size = (12, 20),
    scale: tuple[int, int] = (1, 1),
    **semantics: Any,
) -> None:
    """Edits of a few masks by the packed program and by the oracle, and an edit of nothing by the base run."""
    module, config = compiled.original, compiled.sparsify_config
    semantics = {"norm": config.norm, "attention": config.attention, **semantics}
    inputs = example(module, size=size)
    base = record_run(compiled, inputs)
    run = PinnedRun(module, inputs, pin_inputs_of=pin_inputs_of)
    assert torch.equal(base.output, run.base_output)
    changed = example(module, size=size, seed=1)
    for kind in masks:
        mask = make_mask(kind, size, seed=4)
        edit = {**changed, "sample": torch.where(mask, changed["sample"], inputs["sample"])}
        packed, session = edited(compiled, base, edit, mask)
        assert_close(packed, run.replay(edit, active_sets(session), **semantics), torch.float32)
        if semantics["attention"] == "cached":
            again, _ = edited(compiled, base, inputs, mask)
            assert_close(again, base.output, torch.float32)


def assert_full_mask_is_dense(compiled: SparseModule, size: Size = (12, 20)) -> None:
    """An edit of every site is the original module's run."""
    inputs, changed = (example(compiled.original, size=size, seed=seed) for seed in (0, 1))
    packed, _ = edited(compiled, record_run(compiled, inputs), changed, make_mask("full", size))
    with torch.no_grad():
        assert_close(packed, output_of(compiled.original(**changed)), torch.float32)


def working_program(module: nn.Module, multiple: int = 1, **options: Any) -> Program:
    """A captured, simplified and annotated program before its first pass."""
    captured = captured_graph(module, multiple)
    simplify(captured)
    LayoutRules(captured.multiple).annotate(captured.graph)
    mark_varying(captured)
    return Program(captured, copy_graph(captured.graph), SparsifyConfig(cache=False, **options))


def captured_graph(module: nn.Module, multiple: int | None = 1) -> CapturedGraph:
    """A module's capture, as it comes."""
    inputs = example(module)
    signature, _ = sign(inputs, None)
    return capture(module.eval(), inputs, signature, multiple)


@dataclass(frozen=True)
class StepCall:
    """One sparse call of a compiled module, whose step may be replaced by another graph of the same meaning."""

    executable: Executable
    plan: SitePlan
    slots: Mapping[str, Tensor]
    call: Mapping[str, Tensor]
    hoisted: Mapping[str, Tensor]
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, graph: fx.Graph) -> list[Tensor]:
        """Everything that a step graph, staged or not, returns for this call."""
        addresses = address_table(list(self.slots.values()), torch.device("cpu"))
        sources = Sources(self.call, self.slots, self.hoisted, self.plan, addresses=addresses, held=self.held)
        arguments = resolve(graph_inputs(graph), sources)
        with torch.no_grad():
            return list(self.executable._bind(graph)(*arguments))


def step_call(
    compiled: SparseModule,
    base: BaseRun,
    inputs: dict[str, Any],
    mask: Tensor,
    *,
    block_size: int | None = None,
    padding: bool = False,
) -> StepCall:
    """An edit, ready to run.

    Args:
        compiled: a compiled module.
        base: its recorded base call.
        inputs: of the edit.
        mask: of the edit.
        block_size: of all convolutions; by default the sizes that a session chooses.
        padding: whether rows are repeated up to the sizes that CUDA graphs have.
    """
    _, session = edited(compiled, base, inputs, mask)
    plan = session.plan
    assert plan is not None
    call, _ = compiled._programs.bind((), inputs)
    executable = call.executable
    if block_size is not None:
        plan = SitePlan.build(mask, executable.program.levels, executable.program.convs)
        plan = plan.blocked(dict.fromkeys(executable.program.levels, block_size))
    if padding:
        rows = {level: bucket(table.shape[0]) for level, table in plan.active.items()}
        plan = plan.padded(rows, {key: bucket(table.shape[0]) for key, table in plan.ring.items()})
    slots = dict(base.recording.calls[0].slots)
    hoisted = executable.hoisted.evaluate(executable._bundle_modules(), call.tensors, len(base.output))
    return StepCall(executable, plan, slots, dict(call.tensors), hoisted)


def zoo_step_call(name: str, mask: Tensor, norm: Any = "recorded", **options: Any) -> StepCall:
    """:func:`step_call` of a zoo model, for two samples as large as the mask."""
    size = (mask.shape[0], mask.shape[1])
    base = base_run(name, norm, "cached", 2, size)
    return step_call(compiled_model(name, norm=norm), base, edit_inputs(name, 2, size, mask), mask, **options)


def gather_step() -> fx.GraphModule:
    """A small step of values and taps, with one operation that stays whole."""
    graph = fx.Graph()
    values, taps = graph.placeholder("values"), graph.placeholder("taps")
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (values, 2))
    gathered = graph.call_function(torch.ops.fisedit.gather_taps.default, (doubled, taps))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (gathered, 1)),))
    return fx.GraphModule(nn.Module(), graph)
