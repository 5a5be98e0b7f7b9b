"""Which compiled program serves a call: found by signature, from memory, from disk, or compiled now.

All runs of a module share its programs. What is known of the module and of its programs changes under one lock, which
is never held while something is compiled or computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fisedit_compiler.capture.ambient import Ambient
from fisedit_compiler.capture.keys import ModelKey, ModelState
from fisedit_compiler.capture.keys.notes import Note
from fisedit_compiler.capture.known_models import known_model
from fisedit_compiler.compiling import alone, computing, one_at_a_time
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
        self._moves = 0
        self._runs = 1
        self._renamed: dict[str, str] = {}
        self._lock = threading.RLock()

    def compiled(self) -> list[CompiledProgram]:
        return [executable.program for executable in self.executables()]

    def executables(self) -> list[Executable]:
        return list(self._executables.values())

    def serve(self, runs: int) -> None:
        """Be ready for so many runs at once."""
        with self._lock:
            self._runs = max(self._runs, runs)
            for executable in self._executables.values():
                executable.hoisted.serve(self._runs)

    def refresh(self) -> ModelKey:
        """The module's key, read now; what was computed from another is forgotten."""
        with self._lock:
            return self._follow(self.state.read())

    def glance(self) -> ModelKey:
        """The same by what can be seen without reading weights, for between two calls of a run."""
        with self._lock:
            return self._follow(self.state.glance())

    def _follow(self, key: ModelKey) -> ModelKey:
        if key is self._key:
            return key
        # Weights that moved and are back may have been computed with meanwhile, in another thread.
        moved, self._moves = self._moves != self.state.moves, self.state.moves
        tensors = self.state.tensors
        for (structure, _, _), executable in self._executables.items():
            if structure == key.structure:
                executable.rebind(tensors)
            else:
                # Its parameters may not exist any more. Should the structure come back, it is bound anew.
                executable.unbind()
            if moved or key != self._key:
                executable.hoisted.clear()
        self._key = key
        return key

    def leave_out(self, notes: frozenset[Note], structure: str) -> None:
        """Leave places out of the key that the module's forward writes, and goes by nothing that is left there.

        ``structure`` is the module's as it was before that forward.
        """
        with self._lock:
            self.state.leave_out(notes)
            self._rename(self.name_now(structure))

    def _rename(self, former: str) -> None:
        """Keep the programs of a structure for that of now: what differs is what a forward wrote. Locked."""
        now = self.state.read()
        for key in [key for key in self._executables if key[0] == former != now.structure]:
            self._executables[now.structure, *key[1:]] = self._executables.pop(key)
        self._renamed.pop(now.structure, None)
        if former != now.structure:
            self._renamed[former] = now.structure
        self._key = self._key._replace(structure=now.structure)
        self._follow(now)
        self.binder.forget()

    def follow_renames(self, recording: Recording) -> None:
        """Give a recording the names that the structures it was made with have now."""
        now = self.name_now
        recording.model = recording.model._replace(structure=now(recording.model.structure))
        for number, call in enumerate(recording.calls):
            if call.structure in self._renamed:
                recording.calls[number] = replace(call, structure=now(call.structure))

    def name_now(self, structure: str) -> str:
        """The name that a structure has by now: another run may have found out what a forward only writes."""
        while (renamed := self._renamed.get(structure)) is not None:
            structure = renamed
        return structure

    def structure_of(self, executable: Executable) -> str | None:
        """The structure that a program is of, by the name it has now; ``None`` if another has taken its place."""
        with self._lock:
            return next((key[0] for key, known in self._executables.items() if known is executable), None)

    @property
    def key(self) -> ModelKey:
        """The module's key as it was seen last."""
        return self._key

    def prepare(self, arguments: Mapping[str, Any]) -> Executable:
        """Compile for a typical call ahead of the first one."""
        with computing():
            structure = self.refresh().structure
        ambient = Ambient.now()
        with ambient.neutral():
            executable = self._executable(structure, *self.binder.sign(arguments), ambient)
        with self._lock:
            # The forward was run to capture it; should anybody else have written, the self-check tells.
            self._rename(self.name_now(structure))
        return executable

    def capture_again(self, call: Call) -> Executable:
        """The program of a call, captured anew and not read from disk: the one at hand computes something else."""
        with self._lock:
            for key in [key for key, executable in self._executables.items() if executable is call.executable]:
                del self._executables[key]
            self.binder.forget()
        return self._executable(call.structure, call.signature, call.arguments(), call.ambient, fresh=True)

    def put_back(self, former: Executable, instead_of: Executable) -> None:
        """Keep a program after all: another capture was no better."""
        with self._lock:
            for key in [key for key, executable in self._executables.items() if executable is instead_of]:
                self._executables[key] = former
            self.binder.forget()

    def disown(self, structure: str) -> None:
        """Let the module count as another one from now on: its key, of this structure, missed that it changed."""
        with self._lock:
            former = self.name_now(structure)
            self.state.disown()
            self._key = self.state.read()
            for key in [key for key in self._executables if key[0] == former]:
                self._executables[self._key.structure, *key[1:]] = self._executables.pop(key)
            self.binder.forget()

    def bind(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        ambient: Ambient | None = None,
        structure: str | None = None,
    ) -> tuple[Call, Callable[[Any], Any]]:
        """The call made ready for a session, and how its result must be wrapped for the caller.

        ``ambient`` is the state the caller is in, by default that of the calling thread. ``structure`` is the module's
        as the caller's run sees it, by default as anybody saw it last: another thread may see another one, as a
        forward may read context variables.
        """
        ambient = ambient or Ambient.now()
        structure = self._key.structure if structure is None else structure
        bound = self.binder.bind(args, kwargs)
        signature = bound.form.signature

        def find() -> Executable:
            now = self.name_now(structure)
            executable = bound.form.found.get((now, ambient))
            if executable is None:
                executable = self._executable(structure, signature, bound.canonical(), ambient)
                with self._lock:
                    # Unless it was renamed or exchanged meanwhile, by a run that found it wrong.
                    if self._executables.get((now, ambient, signature)) is executable:
                        bound.form.found[now, ambient] = executable
            _check_divisible(call.sample, executable.program.multiple)
            return executable

        call = Call(
            find,
            signature,
            bound.tensors,
            self._own_forward(ambient.around(bound.run)),
            None if bound.run_part is None else self._own_forward(ambient.around(bound.run_part)),
            bound.canonical,
            structure,
            self.state.differences,
            ambient,
        )
        wrap = self.known.wrap if self.known is not None and bound.form.return_dict else _as_it_is
        return call, wrap

    def _own_forward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What runs the module's own forward; alone where that leaves something behind that it may look at."""
        if not self.state.notes:
            return run

        def undisturbed(*args: Any, **kwargs: Any) -> Any:
            with alone():
                return run(*args, **kwargs)

        return undisturbed

    @one_at_a_time
    def _executable(
        self,
        structure: str,
        signature: CallSignature,
        arguments: dict[str, Any],
        ambient: Ambient,
        fresh: bool = False,
    ) -> Executable:
        structure = self.name_now(structure)  # asked here: who waited for this turn may find it renamed
        key = (structure, ambient, signature)
        executable = self._executables.get(key)
        if executable is None:
            multiple = self.config.multiple
            if multiple is None and self.known is not None:
                multiple = self.known.multiple(self.module)
            # What is told apart by identity alone means nothing to another process.
            with self._lock:
                on_disk = f"{structure} {ambient}" if self.state.is_portable else ""
            with ambient.capturing():
                program = compile_program(
                    self.module, arguments, signature, self.config, multiple, structure=on_disk, fresh=fresh
                )
            executable = Executable(program, self.module, self.config)
            with self._lock:
                executable.hoisted.serve(self._runs)
                self._executables[key] = executable
        return executable


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
