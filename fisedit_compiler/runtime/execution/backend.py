"""What one program's sparse calls run on, and the end of that: under ``backend="auto"`` a refusal means eagerly."""

from __future__ import annotations

import logging
import threading
from functools import cache

import torch

from fisedit_compiler.config import RunsOn, SparsifyConfig
from fisedit_compiler.errors import LoweringError

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (7, 0)
"""Of a CUDA device that Triton makes code for."""

_NOTICE = (
    "Sparse calls of %s run eagerly from now on, which is slower and gives the same results: %s\n"
    'Mend that, or pass SparsifyConfig(backend="eager") to choose it without trying and without this warning.'
)


class ProgramBackend:
    """The backend of one program.

    Attributes:
        refused: why its calls run eagerly though the configuration asked for more; ``None`` while they need not.
    """

    def __init__(self, config: SparsifyConfig, name: str) -> None:
        """``name`` is what warnings call the module."""
        self.config, self.name = config, name
        self.refused: str | None = None
        self._examined: torch.device | None = None
        self._lock = threading.Lock()

    @property
    def is_strict(self) -> bool:
        """Whether a step that cannot be lowered is an error."""
        return self.config.backend == "inductor"

    def on(self, device: torch.device) -> RunsOn:
        """What calls on a device run on; says so once if that is not what ``"auto"`` stands for there."""
        if self.config.backend == "auto" and device != self._examined:
            self._examined = device
            why = obstacle(device)
            if why is not None:
                self._refuse(why)
        return "eager" if self.refused is not None else self.config.backend_on(device.type)

    def give_up(self, error: LoweringError) -> None:
        """Run eagerly after this error; with ``backend="inductor"`` it is raised.

        Raises:
            LoweringError: the given one.
        """
        if self.config.backend != "auto":
            raise error
        self._refuse(str(error).split("\nRemedy:")[0])

    def _refuse(self, why: str) -> None:
        with self._lock:
            told, self.refused = self.refused is not None, why
        if not told:
            logger.warning(_NOTICE, self.name, why)


@cache
def obstacle(device: torch.device) -> str | None:
    """Why nothing can be lowered for a device, as a sentence, if that shows without trying.

    ``None`` for a CPU, where calls are meant to run eagerly.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and this is {device}."
    try:
        from triton.runtime import driver
    except Exception as error:
        return f"Triton cannot be imported ({_first_line(error)}). Install the triton that torch was built with."
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"Triton needs compute capability {least}, and {torch.cuda.get_device_name(device)} has {major}.{minor}."
    try:
        with torch.cuda.device(device):
            driver.active.get_current_target()  # builds Triton's driver, unless that was done before
    except Exception as error:
        return f"Triton does not work here ({_first_line(error)}). It needs a C compiler: install gcc, or set CC."
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
