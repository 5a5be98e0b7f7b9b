"""Which compiled program serves a call: found by signature, from memory, from disk, or compiled now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.inputs import CallSignature, known_model
from fisedit_compiler.program import CompiledProgram, compile_program
from fisedit_compiler.runtime.binding import Binder
from fisedit_compiler.runtime.call import Call
from fisedit_compiler.runtime.executable import Executable
from fisedit_compiler.runtime.fingerprint import structure_key


class ProgramStore:
    """The programs of one module and configuration, by call signature and module structure."""

    def __init__(self, module: nn.Module, config: SparsifyConfig) -> None:
        self.module, self.config = module, config
        self.known = known_model(module)
        self.binder = Binder(module, self.known, config.spatial_inputs)
        self._executables: dict[tuple[str, CallSignature], Executable] = {}
        self._fingerprint: Any = None
        self._structure = ""

    def compiled(self) -> list[CompiledProgram]:
        return [executable.program for executable in self._executables.values()]

    def executables(self) -> list[Executable]:
        return list(self._executables.values())

    def refresh(self, fingerprint: Any) -> None:
        """Forget hoisted values if the module's fingerprint changed, and follow replaced parameters."""
        self._structure = fingerprint[0]
        for executable in self._executables.values():
            executable.rebind()
            if fingerprint != self._fingerprint:
                executable.hoisted.clear()
        self._fingerprint = fingerprint

    def prepare(self, arguments: Mapping[str, Any]) -> Executable:
        """Compile for a typical call ahead of the first one."""
        self._structure = structure_key(self.module)
        return self._executable(*self.binder.sign(arguments))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Callable[[Any], Any]]:
        """The call made ready for a session, and how its result must be wrapped for the caller."""
        bound = self.binder.bind(args, kwargs)
        signature = bound.form.signature

        def find() -> Executable:
            executable = bound.form.found.get(self._structure)
            if executable is None:
                executable = self._executable(signature, bound.canonical())
                bound.form.found[self._structure] = executable
            _check_divisible(call.sample, executable.program.multiple)
            return executable

        call = Call(find, signature, bound.tensors, bound.run, bound.run_part)
        wrap = self.known.wrap if self.known is not None and bound.form.return_dict else _as_it_is
        return call, wrap

    def _executable(self, signature: CallSignature, arguments: dict[str, Any]) -> Executable:
        key = (self._structure, signature)
        if key not in self._executables:
            multiple = self.config.multiple
            if multiple is None and self.known is not None:
                multiple = self.known.multiple(self.module)
            program = compile_program(
                self.module, arguments, signature, self.config, multiple, structure=self._structure
            )
            self._executables[key] = Executable(program, self.module, self.config)
        return self._executables[key]


def _as_it_is(result: Any) -> Any:
    return result


def _check_divisible(sample: Tensor, multiple: int) -> None:
    height, width = sample.shape[2:]
    if height % multiple or width % multiple:
        raise RecordingError(
            f"The input is {height}x{width}, but the model scales its maps down to 1/{multiple}: sparse edits need "
            f"both sizes to be multiples of {multiple}. Choose another image size; outside record() and edit() the "
            "module takes any."
        )
