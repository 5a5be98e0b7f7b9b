"""What inspection needs to know of a compiled module; :class:`~fisedit_compiler.SparseModule` is one."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.runtime.calls.programs import ProgramStore
from fisedit_compiler.runtime.sessions.measured import Measured


class CompiledModule(Protocol):
    """A module with its programs, and what its sessions timed."""

    sparsify_config: SparsifyConfig
    _programs: ProgramStore
    _measured: dict[str, Measured]
    _recorded_calls: int | None

    @property
    def original(self) -> nn.Module: ...

    @property
    def programs(self) -> list[CompiledProgram]: ...
