"""The one file of the tool that knows the inside of the package: where things are, and how they are read.

The same writer runs against the package of two commits, before and after files moved and classes changed. So a module
is looked for at every place in :data:`PLACES`, the earliest first, and objects are read by what they have, not by their
class. When something moves, its new place is added to the table; when something is described in another way, the
function here that reads it learns to give the same text for both.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

PLACES: dict[str, tuple[str, ...]] = {
    # The models. Those of the working tree serve both commits.
    "zoo": ("zoo", "support.zoo", "models.zoo", "tests.support.zoo", "tests.zoo"),
    # (step graph, slot names) -> what reads its slots by address and brings rings.
    "stage_step": (
        "fisedit_compiler.passes.stage:stage",
        "fisedit_compiler.lowering.stage:stage",
        "fisedit_compiler.lowering.staging:stage",
    ),
    # (staged graph module) -> a callable, made by torch.compile.
    "compile_step": (
        "fisedit_compiler.runtime.lowering:compile_step",
        "fisedit_compiler.lowering.lowering:compile_step",
        "fisedit_compiler.lowering.codegen.inductor:compile_step",
        "fisedit_compiler.lowering.step:compile_step",
        "fisedit_compiler.lowering:compile_step",
    ),
}
"""Where a module (``a.b``) or something in it (``a.b:name``) is, or was, or is going to be."""

INPUT_KINDS: dict[str, str] = {"AddressInput": "addresses"}
"""The kind of input that a class stands for, where it is not the class's name: ``RingRowsInput`` is ``ring_rows``."""

SLOT_INPUTS = frozenset({"slot", "addressed", "ring_rows"})
"""Kinds of input whose first value is the name of a slot."""

LOWERED = tuple(f"{graph}_{stage}" for graph in ("step", "update") for stage in ("staged", "cut", "repeated"))
NEW_STAGES = frozenset({"stores", *LOWERED})
"""Stages of ``compiled.stages()`` that earlier commits do not show: :func:`lowered_graphs` writes the last ones of
lowering for all, and what an edit stores is in ``update`` as well."""


# -- where things are ----------------------------------------------------------------------------


def find(what: str) -> Any:
    """The module or object of :data:`PLACES`, from the first place that has it.

    Raises:
        LookupError: none has; the message names the places tried.
    """
    for place in PLACES[what]:
        module, _, name = place.partition(":")
        found = _import(module)
        if found is not None and not name:
            return found
        if hasattr(found, name):
            return getattr(found, name)
    raise LookupError(f"{what} is at none of {', '.join(PLACES[what])}; add its place to PLACES in {__file__}")


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise  # the module is there, and something that it imports is not


def package_folder() -> Path:
    """The folder that holds the package which this process imports."""
    import fisedit_compiler

    return Path(str(fisedit_compiler.__file__)).resolve().parents[1]


# -- the parts of a compiled module --------------------------------------------------------------


@dataclass(frozen=True)
class NamedGraph:
    """A graph to be written, and the graphs of hoisted values that it takes."""

    name: str
    graph: fx.Graph
    hoisted: tuple[tuple[fx.Graph, tuple[str, ...]], ...] = ()


def compile_model(model: Any, options: Mapping[str, Any], *, is_known: bool) -> Any:
    """``sparsify`` of a model of the zoo; never falls back to dense calls unless ``options`` say so."""
    from fisedit_compiler import SparsifyConfig, sparsify

    multiple = None if is_known else model.multiple
    config = SparsifyConfig(**{"dense_above": 1.0, "multiple": multiple, **options})
    return sparsify(model.module, config, example_inputs=None if is_known else model.make_inputs())


def programs_of(compiled: Any) -> list[Any]:
    """The compiled programs, one per call signature."""
    return list(compiled.programs)


def stage_graphs(compiled: Any, program: int) -> Iterator[NamedGraph]:
    """The graph after every pass."""
    hoisted = _hoisted(programs_of(compiled)[program])
    for stage in compiled.stages(program):
        if stage.name not in NEW_STAGES:
            yield NamedGraph(stage.name, stage.graph, hoisted)


def lowered_graphs(compiled: Any, program: int) -> Iterator[NamedGraph]:
    """The step, and the step that records, as they are lowered on a GPU, before repeated blocks become functions."""
    made = programs_of(compiled)[program]
    if hasattr(made, "lowered"):
        stages = compiled.stages(program)
        yield from (NamedGraph(name, stages[f"{name}_cut"].graph, _hoisted(made)) for name in ("step", "update"))
        return
    # Earlier commits stage a graph for every executable, and cut it on the way to torch.compile.
    stage_step, compile_step = find("stage_step"), find("compile_step")
    for name in ("step", "update"):
        staged = stage_step(getattr(made, name), tuple(slot.name for slot in made.slots))
        bound = fx.GraphModule(_attributes(staged, made, compiled.original), staged)
        with mock.patch.object(torch, "compile", lambda module, **_: module):
            lowered = compile_step(bound)
        yield NamedGraph(name, lowered.graph, _hoisted(made))


def _attributes(graph: fx.Graph, program: Any, module: nn.Module) -> dict[str, Any]:
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    constants = constants_of(program)
    return {name: constants[name] if name in constants else attrgetter(name)(module) for name in names}


def _hoisted(program: Any) -> tuple[tuple[fx.Graph, tuple[str, ...]], ...]:
    return tuple((bundle.graph, tuple(bundle.values)) for bundle in program.bundles)


def constants_of(program: Any) -> Mapping[str, Tensor]:
    """Tensors that the graphs close over and the module does not own."""
    return program.constants


def slot_lines(program: Any, values: Mapping[str, Tensor]) -> list[str]:
    """A line for every slot of a recorded call, and one for everything that an edit changes of them."""
    kinds = {slot.name: slot for slot in program.slots}
    lines = []
    for name, value in values.items():
        line = f"${name} {list(value.shape)} {dtype_text(value.dtype)}"
        slot = kinds.get(name)
        if slot is not None:
            kind = getattr(slot.kind, "name", slot.kind)
            line += f" {kind} of %{slot.origin} {layout_text(slot.layout)} groups={_groups_of(slot)}"
            line += f" centred on ${slot.of}" if slot.of else ""
        lines.append(line)
    for update in program.updates:
        described = [f"{name}={value_text(value)}" for name, value in _changed(update, kinds[update.slot])]
        lines.append(f"update of ${update.slot} {' '.join(described)}".rstrip())
    return lines


def _groups_of(slot: Any) -> int:
    """Of a GroupNorm, which the slot says or its kind."""
    return slot.groups if hasattr(slot, "groups") else getattr(slot.kind, "groups", 0)


def _changed(update: Any, slot: Any) -> list[tuple[str, Any]]:
    """What an edit returns of a slot: said by the update, or by the kind of the slot."""
    if hasattr(update, "kind"):
        return [(name, value) for name, value in _values(update) if name != "slot"]
    channels = getattr(slot.kind, "channels", 0)
    kind = "whole" if update.dim is None else "sums" if channels else "rows"
    return [("kind", kind), ("dim", update.dim or 0), ("channels", channels)]


def recorded_calls(recording: Any) -> list[Mapping[str, Tensor]]:
    """Slots by name of every call of a recording."""
    return [{name: call.slots[name] for name in call.slots} for call in recording.calls]


def plan_lines(session: Any) -> list[str]:
    """The tables of the site plan that a session used, a line each; one line if it used none."""
    plan = getattr(session, "plan", None)
    if plan is None:
        return [f"no plan, fallback: {session.fallback is not None}"]
    lines = [f"size {plan.height}x{plan.width}"]
    for table in ("active", "inverse", "ring", "taps", "places", "block_sizes"):
        for key, value in getattr(plan, table).items():
            lines.append(f"{table}({value_text(key)}) = {value_text(value)}")
    return lines


# -- how values are written ----------------------------------------------------------------------


def input_of(node: fx.Node) -> tuple[Any, ...]:
    """What a placeholder stands for, as its kind and further values, whether it is told by a tuple or a class.

    ``("call", "sample")`` and ``CallInput(name="sample")`` are the same; without either it is an input of the call.
    """
    identity = node.meta.get("input")
    if identity is None:
        return "call", node.name
    if isinstance(identity, tuple) and not hasattr(identity, "_fields"):
        return identity
    kind = type(identity).__name__
    known = INPUT_KINDS.get(kind) or re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Input")).lower()
    return known, *(value for _, value in _values(identity))


def description_of(node: fx.Node) -> str:
    """Shape, precision and layout of a node's value, and the module of the model that it comes from."""
    spec, layout = node.meta.get("spec"), node.meta.get("layout")
    specs, layouts = (value if isinstance(value, tuple) else (value,) for value in (spec, layout))
    parts = [_spec_text(part) for part in specs if part is not None]
    parts += [text for part in layouts if part is not None and (text := layout_text(part)) != "plain"]
    path = node.meta.get("path")
    return " ".join(parts) + (f" in {path}" if path else "")


def layout_text(layout: Any) -> str:
    """``map@2 [2, 3]``: kind, level and axes of the sites. Why a value has no sites is words, and left out."""
    kind = getattr(layout, "kind", None)
    if kind is None:
        return str(layout)
    level = "" if layout.level is None else f"@{layout.level}"
    return f"{kind}{level}" + (f" {value_text(tuple(layout.axes))}" if layout.axes else "")


def _spec_text(spec: Any) -> str:
    return f"[{', '.join(map(_size_text, spec.shape))}] {dtype_text(spec.dtype)}"


@cache
def _size_text(size: Any) -> str:
    return str(size)  # a hundred times slower for an expression than for a number, and there are few expressions


def target_text(target: Any) -> str:
    """The name of an operation, without the module it is in."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def value_text(value: Any) -> str:
    """An argument or a key. Of a dataclass the fields that differ from their defaults are written, not its name."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {dtype_text(value.dtype)} {digest(value)[:16]}"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, slice):
        return f"slice({', '.join(value_text(part) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{{{', '.join(f'{name}={value_text(item)}' for name, item in _told(value))}}}"
    if isinstance(value, (str, float)):
        return repr(value)
    return str(value)


def _told(value: Any) -> Iterator[tuple[str, Any]]:
    defaults = {field.name: field.default for field in fields(value)}
    for name, item in _values(value):
        if defaults[name] is MISSING or item != defaults[name]:
            yield name, item


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(value):
        yield field.name, getattr(value, field.name)


def digest(value: Tensor) -> str:
    """SHA-256 of shape, precision and bytes."""
    plain = value.detach().cpu().contiguous()
    described = f"{list(plain.shape)} {dtype_text(plain.dtype)}".encode()
    return hashlib.sha256(described + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
