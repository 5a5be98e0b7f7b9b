"""What a check compares: the options of ``compiled.check()``, and two calls, a mask and a plan made of them.

Comparing is ``check.py``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisedit_compiler.compiling import alone
from fisedit_compiler.errors import ConfigError, MaskError, RecordingError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.inspect.example_inputs import edited_inputs, sample_inputs
from fisedit_compiler.inspect.stages import choose_program
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.masks import mask_pixels, to_site_mask
from fisedit_compiler.recordings.recording import Recording

if TYPE_CHECKING:
    from fisedit_compiler.inspect.compiled import CompiledModule
    from fisedit_compiler.runtime.execution.executable import Executable


@dataclass(frozen=True)
class CheckOptions:
    """What is compared, and how; the options are those of :meth:`SparseModule.check`.

    Raises:
        ConfigError: the options contradict each other, or the tolerance is no relative error.
    """

    inputs: Mapping[str, Any] | None = None
    edited: Mapping[str, Any] | None = None
    recording: Recording | None = None
    call: int = 0
    program: int = 0
    tolerance: float | None = None
    seed: int = 0
    lowered: bool = False

    def __post_init__(self) -> None:
        if self.inputs is None and (self.edited is not None or self.recording is not None):
            given = "edited" if self.edited is not None else "recording"
            raise ConfigError(
                f"check() was given {given}= without inputs=; pass the keyword arguments of the base call as "
                "inputs=, so that there is something to compare with."
            )
        if self.tolerance is not None and not self.tolerance >= 0.0:
            raise ConfigError(f"tolerance={self.tolerance!r} must be a relative error, 0 or more, or None.")


@dataclass(frozen=True)
class Subject:
    """Two calls to check one program with.

    Attributes:
        executable: the program.
        mask: bool ``[H, W]``, not yet grown by the configuration's dilation.
        plan: the site plan of the mask.
        base: the base call's tensors by placeholder name.
        edited: the edit's.
        recorded: slots of a recording to check instead of a fresh one.
        options: how to compare.
    """

    executable: Executable
    mask: Tensor
    plan: SitePlan
    base: Mapping[str, Tensor]
    edited: Mapping[str, Tensor]
    recorded: Mapping[str, Tensor] | None
    options: CheckOptions

    @property
    def runs_updates(self) -> bool:
        """Whether the edit that records itself is run: where it is lowered, only if that was asked for."""
        return self.options.lowered or not self.executable.is_lowered(self.edited)

    @property
    def reuses(self) -> bool:
        """Whether the cut step is run, too."""
        program = self.executable.program
        return self.runs_updates and program.config.reuse != "off" and not isinstance(program.cut, str)

    def of(self, executable: Executable) -> Subject:
        """The same calls for another program of the same captured graph, on a fresh recording."""
        plan = _plan(executable, self.mask, self.base[executable.program.spatial[0]])
        return replace(self, executable=executable, plan=plan, recorded=None)

    def __str__(self) -> str:
        config, sites = self.executable.program.config, self.plan.height * self.plan.width
        return (
            f"{self.plan.rows(Fraction(1))} of {sites} sites active, norm={config.norm!r}, "
            f"attention={config.attention!r}"
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 as they are written, not in tf32: a check is of the compiler, not of tensor cores.

    The setting is the whole process's, so on a GPU other threads' calls wait.
    """
    cudnn = torch.backends.cudnn
    with alone() if torch.cuda.is_initialized() else nullcontext():
        before, cudnn.allow_tf32 = cudnn.allow_tf32, False
        try:
            yield
        finally:
            cudnn.allow_tf32 = before


def make_subject(module: CompiledModule, mask: Any, options: CheckOptions) -> Subject:
    """The calls and the plan of a check; see :meth:`SparseModule.check` for arguments and errors."""
    inputs, edited, recording = options.inputs, options.edited, options.recording
    generator = torch.Generator().manual_seed(options.seed)
    if inputs is None:
        choose_program(module.programs, options.program)
        executable = module._programs.executables()[options.program]
        sites = _own_size(mask, executable.program.multiple)
        height, width = sites.shape
        base = sample_inputs(executable.program, height, width, generator)
    else:
        bound, _ = module._programs.bind((), inputs)
        executable, base = bound.executable, dict(bound.tensors)
        sites = to_site_mask(mask, *bound.sample.shape[2:])
    if options.lowered and not executable.is_lowered(base):
        refused = executable.backend.refused
        because = "" if refused is None else f" ({refused})"
        raise ConfigError(
            "check(lowered=True) compares what Inductor and CUDA graphs make of a step, but this module runs it "
            f"eagerly here{because}. Move it to a CUDA device and sparsify it with "
            'SparsifyConfig(backend="inductor"), or leave lowered= away.'
        )
    sites = sites.cpu()
    if not bool(sites.any()):
        raise MaskError("The mask is empty: an edit gives the recorded outputs back, and there is nothing to check.")
    plan = _plan(executable, sites, base[executable.program.spatial[0]])
    if edited is None:
        changed = edited_inputs(executable.program, base, plan, generator)
    else:
        other, _ = module._programs.bind((), edited)
        changed = dict(other.tensors)
        _check_alike(executable.program, base, changed, same_program=other.executable is executable)
    recorded = None if recording is None else _recorded(recording, options.call, executable, base)
    return Subject(executable, sites, plan, base, changed, recorded, options)


def _plan(executable: Executable, mask: Tensor, sample: Tensor) -> SitePlan:
    """As the executable makes it, without being kept there, and with the levels of values that stay dense."""
    program = executable.program
    layouts = [node.meta.get("layout") for node in program.captured.graph.nodes]
    dense = {layout.level for layout in layouts if isinstance(layout, Layout) and layout.is_rows}
    levels = program.levels | {level for level in dense if level is not None}
    plan = SitePlan.build(mask, levels, program.convs, dilation=executable.config.dilation)
    return executable.plans.divided(plan, sample.shape[0], sample.element_size(), sample.device.type).to(sample.device)


def _own_size(mask: Any, multiple: int) -> Tensor:
    """The mask at its own size, which is the size of the call that is made up."""
    if isinstance(mask, (str, Path)):
        raise MaskError("A mask that is a file has no size of its own here; open it, or pass inputs= as well.")
    sites = mask_pixels(mask)  # a photo turned by its EXIF orientation has another size than it says
    height, width = sites.shape
    if height % multiple or width % multiple:
        raise MaskError(
            f"The mask is {height}x{width}, but the model scales its maps down to 1/{multiple}: both sizes must be "
            f"multiples of {multiple}."
        )
    return sites


def _check_alike(
    program: CompiledProgram, base: Mapping[str, Tensor], edited: Mapping[str, Tensor], *, same_program: bool
) -> None:
    """Two calls that no edit could pair are refused.

    Raises:
        RecordingError: arguments or shapes differ.
    """
    shapes = {name: (tuple(base[name].shape), tuple(edited[name].shape)) for name in base if name in edited}
    spatial = {name: pair for name, pair in shapes.items() if name in program.spatial and pair[0] != pair[1]}
    if not same_program or spatial:
        found = "; ".join(f"{name}: {list(then)} and {list(now)}" for name, (then, now) in spatial.items())
        raise RecordingError(
            f"inputs= and edited= are calls of other shapes or arguments ({found or 'other arguments'}). Pass the two "
            "calls of one edit."
        )


def _recorded(
    recording: Recording, call: int, executable: Executable, base: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The slots of the recorded call to check.

    Whether they are of these weights and inputs is what the check finds out.

    Raises:
        RecordingError: there is no such call, or it is of another program, size or batch.
    """
    if not 0 <= call < recording.num_calls:
        raise RecordingError(f"The recording has {recording.num_calls} calls; there is no call {call}.")
    record = recording.calls[call]
    sample = base[executable.program.spatial[0]]
    recorded = (record.batch, record.height, record.width)
    given = (sample.shape[0], *sample.shape[2:])
    if record.signature != executable.program.signature or recorded != given:
        raise RecordingError(
            f"Call {call} of the recording has batch, height and width {recorded}, inputs= has {given}, or other "
            "arguments. Pass the arguments of that call."
        )
    return record.slots
