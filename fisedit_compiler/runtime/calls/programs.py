"""Which compiled program serves a call: found by signature, from memory, from disk, or compiled now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fisedit_compiler.capture.ambient import Ambient
from fisedit_compiler.capture.keys import ModelKey, ModelState
from fisedit_compiler.capture.keys.notes import Note
from fisedit_compiler.capture.known_models import known_model
from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.lowering.program import CompiledProgram, compile_program
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.calls.binding import Binder
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.execution.executable import Executable


class ProgramStore:
    """The programs of one module and configuration, by call signature and module structure."""

    def __init__(self, module: nn.Module, config: SparsifyConfig) -> None:
        self.module, self.config = module, config
        self.known = known_model(module)
        self.binder = Binder(module, self.known, config.spatial_inputs)
        self._executables: dict[tuple[str, Ambient, CallSignature], Executable] = {}
        self.state = ModelState(module)
        self._key = ModelKey("", "")
        self._renamed: dict[str, str] = {}

    def compiled(self) -> list[CompiledProgram]:
        return [executable.program for executable in self._executables.values()]

    def executables(self) -> list[Executable]:
        return list(self._executables.values())

    def refresh(self) -> ModelKey:
        """The module's key, read now; what was computed from another is forgotten."""
        return self._follow(self.state.read())

    def glance(self) -> ModelKey:
        """The same by what can be seen without reading weights, for between two calls of a run."""
        return self._follow(self.state.glance())

    def _follow(self, key: ModelKey) -> ModelKey:
        if key is self._key:
            return key
        for (structure, _, _), executable in self._executables.items():
            if structure == key.structure:
                executable.rebind()
            else:
                # Its parameters may not exist any more. Should the structure come back, it is bound anew.
                executable.unbind()
            if key != self._key:
                executable.hoisted.clear()
        self._key = key
        return key

    def leave_out(self, notes: frozenset[Note]) -> None:
        """Leave places out of the key that the module's forward writes, and goes by nothing that is left there."""
        self.state.leave_out(notes)
        self._rename()

    def _rename(self) -> None:
        """Keep the programs of the last key for the key of now: what differs is what a forward wrote."""
        former, self._key = self._key.structure, self.state.read()
        for key in [key for key in self._executables if key[0] == former != self._key.structure]:
            self._executables[self._key.structure, *key[1:]] = self._executables.pop(key)
        self._renamed.pop(self._key.structure, None)
        if former != self._key.structure:
            self._renamed[former] = self._key.structure
        self.binder.forget()

    def follow_renames(self, recording: Recording) -> None:
        """Give a recording the names that the structures it was made with have now."""
        now = self._renamed_to
        recording.model = recording.model._replace(structure=now(recording.model.structure))
        for number, call in enumerate(recording.calls):
            if call.structure in self._renamed:
                recording.calls[number] = replace(call, structure=now(call.structure))

    def _renamed_to(self, structure: str) -> str:
        while structure in self._renamed:
            structure = self._renamed[structure]
        return structure

    @property
    def key(self) -> ModelKey:
        """The module's key as it was seen last."""
        return self._key

    def prepare(self, arguments: Mapping[str, Any]) -> Executable:
        """Compile for a typical call ahead of the first one."""
        self.refresh()
        ambient = Ambient.now()
        with ambient.neutral():
            executable = self._executable(*self.binder.sign(arguments), ambient)
        self._rename()  # the forward was run to capture it; should anybody else have written, the self-check tells
        return executable

    def capture_again(self, call: Call) -> Executable:
        """The program of a call, captured anew and not read from disk: the one at hand computes something else."""
        for key in [key for key, executable in self._executables.items() if executable is call.executable]:
            del self._executables[key]
        self.binder.forget()
        return self._executable(call.signature, call.arguments(), call.ambient, fresh=True)

    def put_back(self, former: Executable, instead_of: Executable) -> None:
        """Keep a program after all: another capture was no better."""
        for key in [key for key, executable in self._executables.items() if executable is instead_of]:
            self._executables[key] = former
        self.binder.forget()

    def disown(self) -> None:
        """Let the module count as another one from now on: its key missed that it changed."""
        former = self._key.structure
        self.state.disown()
        self._key = self.state.read()
        for key in [key for key in self._executables if key[0] == former]:
            self._executables[self._key.structure, *key[1:]] = self._executables.pop(key)
        self.binder.forget()

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], ambient: Ambient | None = None
    ) -> tuple[Call, Callable[[Any], Any]]:
        """The call made ready for a session, and how its result must be wrapped for the caller.

        ``ambient`` is the state the caller is in, by default that of the calling thread.
        """
        ambient = ambient or Ambient.now()
        bound = self.binder.bind(args, kwargs)
        signature = bound.form.signature

        def find() -> Executable:
            structure = self._key.structure
            executable = bound.form.found.get((structure, ambient))
            if executable is None:
                executable = self._executable(signature, bound.canonical(), ambient)
                bound.form.found[structure, ambient] = executable
            _check_divisible(call.sample, executable.program.multiple)
            return executable

        call = Call(
            find,
            signature,
            bound.tensors,
            ambient.around(bound.run),
            None if bound.run_part is None else ambient.around(bound.run_part),
            bound.canonical,
            self._key.structure,
            self.state.differences,
            ambient,
        )
        wrap = self.known.wrap if self.known is not None and bound.form.return_dict else _as_it_is
        return call, wrap

    @one_at_a_time
    def _executable(
        self, signature: CallSignature, arguments: dict[str, Any], ambient: Ambient, fresh: bool = False
    ) -> Executable:
        structure = self._key.structure
        key = (structure, ambient, signature)
        if key not in self._executables:
            multiple = self.config.multiple
            if multiple is None and self.known is not None:
                multiple = self.known.multiple(self.module)
            # What is told apart by identity alone means nothing to another process.
            on_disk = f"{structure} {ambient}" if self.state.is_portable else ""
            with ambient.capturing():
                program = compile_program(
                    self.module, arguments, signature, self.config, multiple, structure=on_disk, fresh=fresh
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
