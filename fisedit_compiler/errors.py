"""Every error a user can meet, each naming the mistake, its place and the remedy.

One class per kind of mistake, so that a caller can catch exactly what it can mend. No logic lives here.
"""

from __future__ import annotations


class FiseditError(Exception):
    """Base class of every error raised on purpose by ``fisedit_compiler``."""


class ConfigError(FiseditError, ValueError):
    """A ``SparsifyConfig`` or another option has a value outside its documented range."""


class CaptureError(FiseditError):
    """The module could not be captured as one graph, or has no spatial input."""


class LayoutError(FiseditError):
    """A layout rule was given a graph it cannot describe."""


class VerificationError(FiseditError):
    """A graph left by a pass breaks an invariant; always a defect of the pass, never of the user's model."""


class SlotKindError(VerificationError):
    """A kind of recorded values contradicts itself, or a method of it raised; always a defect of the kind."""


class LoweringError(FiseditError, RuntimeError):
    """A right program could not be turned into code for its device: Inductor, Triton or a CUDA graph refused it.

    ``node`` is the node of the captured graph it happened at, empty if none was found.
    """

    node: str = ""


class PlanError(FiseditError, ValueError):
    """A site plan was asked for with levels or sets that contradict each other."""


class MaskError(FiseditError, ValueError):
    """A mask has the wrong size, dtype or contents."""


class RecordingError(FiseditError):
    """A recording is missing, empty, unfinished, or does not fit the run it is used for."""


class NonFiniteError(RecordingError, ArithmeticError):
    """A recorded run or an edit of it overflowed: its outputs hold NaN or infinity."""


class ModeError(FiseditError, RuntimeError):
    """``record()`` or ``edit()`` was entered while another mode is active."""


class PromptError(FiseditError, ValueError):
    """A prompt is longer than the text encoder reads, or is not text."""


class ModelNotFoundError(FiseditError, FileNotFoundError):
    """A model directory is missing or is not in diffusers layout."""


class PictureError(FiseditError, ValueError):
    """A picture to load is unreadable, or of the wrong size, type or contents."""
