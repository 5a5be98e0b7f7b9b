"""A stand-in for a compiled UNet that runs the pinned program: the meaning of an edit, without any packing.

Slow on purpose: every call runs the captured dense graph for the base's inputs and the edit's, node by node
(``inspect/pinned.py``). With it an evaluation sees what the approximations cost apart from how they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.inspect.pinned import PinnedInterpreter, inputs_of
from fisedit_compiler.runtime.sessions.fallback import pinning_plan

if TYPE_CHECKING:
    from fisedit_compiler.module import SparseModule


@dataclass(frozen=True)
class BaseCall:
    """The arguments of one call of the base run."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@contextmanager
def kept_calls(module: nn.Module) -> Iterator[list[BaseCall]]:
    """Collect the arguments of every call of ``module`` inside the block."""
    calls: list[BaseCall] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The pipeline may write to its tensors after the call.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        calls.append(BaseCall(args, kwargs))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class PinnedUNet(nn.Module):
    """Takes a compiled UNet's place in a pipeline for one run under an edit's caption.

    Args:
        compiled: says what is recorded, rewritten and left dense, and with which statistics.
        base: the calls of the base run.
        mask: bool ``[H, W]`` of the sites that may change.
    """

    def __init__(self, compiled: SparseModule, base: list[BaseCall], mask: Tensor) -> None:
        super().__init__()
        self.compiled, self.base, self.mask = compiled, base, mask
        self.call = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("compiled"), name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction of the pinned program.

        Raises:
            RecordingError: there are more calls than the base run made.
        """
        if self.call >= len(self.base):
            raise RecordingError(f"the base run made {len(self.base)} calls; run the edit with as many steps")
        recorded = self.base[self.call]
        self.call += 1
        bind = self.compiled._programs.bind
        base, _ = bind(recorded.args, dict(recorded.kwargs))
        edited, wrap = bind(args, kwargs)
        executable, program = edited.executable, edited.executable.program
        dilation = self.compiled.sparsify_config.dilation
        plan = pinning_plan(self.mask, program, dilation, edited.sample.device)
        interpreter = PinnedInterpreter(program, executable.module, plan, lambda node, value: None)
        outputs = interpreter.run(*inputs_of(program, base.tensors, edited.tensors))
        return wrap(executable.assemble([value.pinned for value in outputs]))
