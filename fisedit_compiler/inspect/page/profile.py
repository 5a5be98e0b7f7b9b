"""One sparse call of a compiled module, made for its time line."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.inspect.compiled import CompiledModule
from fisedit_compiler.inspect.example_inputs import edited_inputs, sample_inputs, scalars_of
from fisedit_compiler.inspect.explain import TEXT_TOKENS
from fisedit_compiler.inspect.page.timeline import Event, profile_call
from fisedit_compiler.inspect.stages import choose_program
from fisedit_compiler.recordings.stores import hold


@torch.no_grad()
def profile_edit(compiled: CompiledModule, mask: Tensor) -> list[Event]:
    """The operations of a second sparse call, its inputs random: the first one computes what depends on the prompt.

    Args:
        compiled: a module that is compiled already.
        mask: bool ``[H, W]`` at latent resolution.
    """
    choose_program(compiled.programs, 0)
    executable = compiled._programs.executables()[0]
    program, generator = executable.program, torch.Generator().manual_seed(0)
    height, width = mask.shape
    base = sample_inputs(program, height, width, generator, tokens=TEXT_TOKENS)
    sample = base[program.spatial[0]]
    plan = executable.plans.of(mask, compiled.sparsify_config.dilation, sample)
    edited = edited_inputs(program, base, plan, generator)
    slots, scalars = hold(executable.record(base)[1]), scalars_of(program, base)

    def call() -> None:
        executable.step(edited, slots, plan, update=False, scalars=scalars)

    call()
    return profile_call(call, sample.device)
