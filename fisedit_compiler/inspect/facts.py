"""What is explained of one program: numbers, reasons, formulas. ``explain.py`` makes them, ``tables.py`` draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import sympy

from fisedit_compiler.inspect.costs import Cost
from fisedit_compiler.runtime.sessions.measured import Measured

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class OperationCount:
    """How many nodes of one operation were captured, and what became of them; the five others add up to ``captured``.

    Attributes:
        operation: such as ``aten.conv2d``.
        captured: nodes of the dense graph.
        rewritten: in the step, on rows of the active sites.
        hoisted: moved out of the step, since they depend on neither image nor recording.
        fused: nothing of their own is left: another operation does their work (an upsampling is in the tables of the
            next convolution, sibling linear layers are in the first of them), or none has to (an order of axes that
            rows have anyway).
        kept: in the step as they were: sizes, and what depends on the image and has no sites.
        refused: dense between a scatter and a gather, for a reason.
        share: of the dense call's FLOPs, in [0, 1].
    """

    operation: str
    captured: int
    rewritten: int
    hoisted: int
    fused: int
    kept: int
    refused: int
    share: float


@dataclass(frozen=True)
class Refusal:
    """An operation that stays dense.

    Attributes:
        node: its name in the captured graph.
        path: the module in the user's model.
        source: file, line and code in the user's model, where known.
        operation: such as ``aten.cumsum``.
        reason: why it stays dense.
        share: of the dense call's FLOPs, or of its bytes for an operation without FLOPs, in [0, 1].
        of: which of the two.
    """

    node: str
    path: str
    source: str
    operation: str
    reason: str
    share: float
    of: Literal["FLOPs", "bytes"]


@dataclass(frozen=True)
class OperationKernel:
    """What computes one operation of the step, or one that its reference calls.

    Attributes:
        operation: such as ``fisedit.cross_attention``.
        calls: how many calls of a step.
        runs: the provider's name, ``reference`` for the op's own implementation in PyTorch, or ``inductor`` where that
            is compiled together with what surrounds it.
        passed_over: why providers that come first do not compute it, by their names.
    """

    operation: str
    calls: int
    runs: str
    passed_over: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LevelRows:
    """One level of a site plan.

    Attributes:
        level: 1 is the latent's resolution, 2 half of it.
        sites: all sites.
        active: sites that are computed.
        block_size: sites along the side of a block of its convolutions; ``None`` if none can be computed in blocks.
        estimates: microseconds of all its convolutions by block size, where somebody measured.
    """

    level: Fraction
    sites: int
    active: int
    block_size: int | None
    estimates: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SlotBytes:
    """The recorded values of one kind.

    Attributes:
        kind: its name, such as ``canvas`` (``fisedit_compiler/slots/``).
        slots: how many.
        formula: bytes a call.
        nbytes: the same, evaluated.
    """

    kind: str
    slots: int
    formula: sympy.Expr
    nbytes: int


@dataclass(frozen=True)
class Work:
    """What one graph costs; see ``costs.py`` for what is counted.

    Attributes:
        name: ``dense`` (the captured graph), ``step`` (the sparse one), ``shallow step`` (what is left of
            it where values are reused), or the name of a bundle of hoisted values.
        when: how often it runs.
        cost: formulas.
        flops: evaluated; ``None`` for what depends on a mask, without one.
        nbytes: likewise.
        measured: calls of this kind, size, batch and area that were timed.
    """

    name: str
    when: str
    cost: Cost
    flops: int | None
    nbytes: int | None
    measured: Measured | None = None


@dataclass(frozen=True)
class Setting:
    """The call that formulas are evaluated for.

    Attributes:
        height: rows of the spatial input.
        width: columns of the spatial input.
        batch: samples of a call.
        tokens: tokens of a prompt.
        element_size: bytes of a parameter's element.
        device: ``torch.device.type`` of where calls run.
        calls: calls of a recording, where one was made.
    """

    height: int
    width: int
    batch: int
    tokens: int
    element_size: int
    device: str
    calls: int | None = None


@dataclass(frozen=True)
class ProgramExplanation:
    """One program, for one call.

    Attributes:
        inputs: names of the spatial inputs.
        setting: the call that formulas are evaluated for.
        convolutions: number of sparse convolutions.
        operations: what became of every operation, the costliest first.
        refusals: every operation that stays dense, the costliest first.
        area: share of active sites; ``None`` without a mask.
        levels: rows and block sizes, finest level first; none without a mask.
        slots: recorded bytes by kind of slot.
        work: FLOPs and bytes of the dense call, of the step, and of what is hoisted.
        kernels: what computes the step's operations; without a mask, for all sites in blocks of one.
        reuse: where a call can take values from an earlier one, and which calls do, or why none can, as a sentence.
    """

    inputs: tuple[str, ...]
    setting: Setting
    convolutions: int
    operations: tuple[OperationCount, ...]
    refusals: tuple[Refusal, ...]
    area: float | None
    levels: tuple[LevelRows, ...]
    slots: tuple[SlotBytes, ...]
    work: tuple[Work, ...]
    kernels: tuple[OperationKernel, ...] = ()
    reuse: str = ""

    @property
    def recorded_bytes(self) -> int:
        """Bytes that a recording holds per call."""
        return sum(kind.nbytes for kind in self.slots)
