"""Which compiled program serves a call: found by signature, from memory, from disk, or compiled now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.inputs import CallSignature, bind, known_model, sign
from fisedit_compiler.program import CompiledProgram, compile_program
from fisedit_compiler.runtime.executable import Executable
from fisedit_compiler.runtime.fingerprint import structure_key
from fisedit_compiler.runtime.sessions import Call


class ProgramStore:
    """The programs of one module and configuration, by call signature and module structure."""

    def __init__(self, module: nn.Module, config: SparsifyConfig) -> None:
        self.module, self.config = module, config
        self.known = known_model(module)
        self._executables: dict[tuple[str, CallSignature], Executable] = {}
        self._fingerprint: Any = None
        self._structure = ""

    def compiled(self) -> list[CompiledProgram]:
        return [executable.program for executable in self._executables.values()]

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
        bound = bind(self.module, (), arguments, self.known.constants if self.known else {})
        signature, _tensors, canonical = self._sign(bound)
        return self._executable(signature, canonical)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Callable[[Any], Any]]:
        """The call made ready for a session, and how its result must be wrapped for the caller."""
        bound = bind(self.module, args, kwargs, self.known.constants if self.known else {})
        signature, tensors, canonical = self._sign(bound)

        def find() -> Executable:
            executable = self._executable(signature, canonical)
            _check_divisible(tensors[signature.primary], executable.program.multiple)
            return executable

        named = {name.replace(".", "_"): tensor for name, tensor in tensors.items()}
        if self.known is None:
            return Call(find, signature, named, lambda: self.module(*args, **kwargs)), lambda result: result
        known = self.known
        fixed = {name: value for name, value in known.constants.items() if name in bound}
        call = Call(find, signature, named, lambda: self.module(**{**bound, **fixed}))
        wanted = bind(self.module, args, kwargs, {}).get("return_dict", True)
        return call, (known.wrap if wanted else lambda result: result)

    def _sign(self, bound: dict[str, Any]) -> tuple[CallSignature, dict[str, Any], dict[str, Any]]:
        spatial = self.config.spatial_inputs
        if self.known is not None:
            bound = self.known.canonical(bound)
            spatial = spatial or self.known.spatial
        signature, tensors = sign(bound, spatial)
        return signature, tensors, bound

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


def _check_divisible(sample: Tensor, multiple: int) -> None:
    height, width = sample.shape[2:]
    if height % multiple or width % multiple:
        raise RecordingError(
            f"The input is {height}x{width}, but the model scales its maps down to 1/{multiple}: sparse edits need "
            f"both sizes to be multiples of {multiple}. Choose another image size; outside record() and edit() the "
            "module takes any."
        )
