"""Which axis of every slot counts the samples of a batch: what batches are repeated and taken apart along."""

from __future__ import annotations

from collections.abc import Mapping

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.graph.batch_axes import Mixed, samples_of
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.lowering.program import CompiledProgram

BatchAxes = Mapping[str, int | None]
"""By slot the axis that counts samples, in its value or in its rows; ``None`` for what all samples share."""


def batch_axes(program: CompiledProgram) -> tuple[BatchAxes, BatchAxes]:
    """The batch axis of every slot's value, and of its rows.

    Raises:
        ConfigError: an operation mixes the samples, or an output has them elsewhere than first.
    """
    samples = samples_of(program.captured.graph, program.signature)
    mixed = next((item.reason for item in samples.values() if isinstance(item, Mixed)), None)
    if mixed is not None:
        raise ConfigError(f"copies: {mixed}, so copies would reach into each other; make the edits one by one")
    nodes = {node.name: node for node in program.captured.graph.nodes}
    values: dict[str, int | None] = {}
    rows: dict[str, int | None] = {}
    outputs = {output.slot for output in program.outputs}
    for slot in program.slots:
        axis = samples[nodes[slot.origin]]
        assert not isinstance(axis, Mixed)
        found = (None, None) if axis is None else slot.batch_axes(axis)
        if found is None or (slot.name in outputs and axis != 0):
            shape = list(spec_of(nodes[slot.origin]).shape)
            why = "whose samples are not first"
            if found is None and axis == 0:
                why = f"whose samples its kind {slot.kind.name!r} cannot take apart"
            raise ConfigError(f"copies: {slot.name} is {shape}, {why}; make the edits one by one")
        values[slot.name], rows[slot.name] = found
    return values, rows
