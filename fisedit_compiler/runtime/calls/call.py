"""One call of a compiled module, as its modes receive it.

From arguments it is made in ``programs.py``; how it runs is decided in ``edit_session.py`` and ``record_session.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from fisedit_compiler.capture.ambient import PLAIN, Ambient
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.recordings.recording import CallRecord
from fisedit_compiler.recordings.stores import hold
from fisedit_compiler.runtime.execution.executable import Executable

CallKind = Literal["dense", "sparse", "shallow", "skipped"]
"""How a call of an edit ran: on all sites, on the active ones, on those of the finest level, or not at all."""


@dataclass(frozen=True)
class Call:
    """One call of the module, bound and flattened.

    Attributes:
        find_executable: finds or compiles the program for the signature; call ``executable`` instead.
        signature: what the program is compiled for.
        tensors: tensor arguments by placeholder name.
        run_original: runs the user's own module on the call's arguments.
        run_part: runs the user's own module on some samples of the arguments; ``None`` if they cannot be cut.
        arguments: the arguments by name, in the form that is captured.
        structure: key of the module's structure at this call.
        differences: paths of the submodules in which two structures differ.
        ambient: the state that the call was made in.
    """

    find_executable: Callable[[], Executable]
    signature: CallSignature
    tensors: Mapping[str, Tensor]
    run_original: Callable[..., Any]
    run_part: Callable[[Tensor], Any] | None = None
    arguments: Callable[[], dict[str, Any]] = dict
    structure: str = ""
    differences: Callable[[str, str], list[str]] = lambda now, then: []
    ambient: Ambient = PLAIN

    @property
    def executable(self) -> Executable:
        """The program for the signature; on first use, so that a call that is refused compiles nothing."""
        # Python 3.11's cached_property has one lock for all instances: who compiles would stop everybody's calls.
        found = self.__dict__.get("found")
        if found is None:
            found = self.__dict__["found"] = self.find_executable()
        return found

    @property
    def sample(self) -> Tensor:
        """The spatial input that sets height and width."""
        found: Tensor | None = self.__dict__.get("_sample")
        if found is None:
            found = self.__dict__["_sample"] = self.tensors[self.signature.sample_name]
        return found

    @cached_property
    def timestep(self) -> float | None:
        """The timestep if it is one number; reading it waits for the device."""
        return float(self.tensors["timestep"]) if self.has_timestep else None

    @property
    def has_timestep(self) -> bool:
        """Whether there is a timestep and it is one number."""
        return any(spec.name == "timestep" and not spec.axes for spec in self.signature.tensors)

    def store(self, slots: Mapping[str, Tensor], timestep: float | None, inputs: Mapping[str, Tensor]) -> CallRecord:
        """A record of the call, with the slots of a dense run."""
        batch, _, height, width = self.sample.shape
        maps = () if len(slots) == len(self.executable.slot_names) else self.executable.map_names
        held = hold(slots)
        return CallRecord(
            self.signature, batch, height, width, timestep, held, inputs, maps, self.structure, self.ambient
        )
