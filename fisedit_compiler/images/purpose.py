"""What an image is read for: its name in errors, their class, and how much is read at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fisedit_compiler.errors import FiseditError, MaskError, PictureError

MAX_PIXELS = 2**26
"""The most pixels that are decoded: 8192 x 8192. A few kilobytes of a file can claim any number of them."""

_REASON_LENGTH = 160


@dataclass(frozen=True)
class Purpose:
    """What an image is wanted as.

    Attributes:
        noun: what errors call it.
        error: the class of errors about it.
        arrays: the arrays it may be, for errors.
    """

    noun: str
    error: type[FiseditError]
    arrays: str

    def check_size(self, shape: Sequence[int]) -> None:
        """Refuse an image of more than :data:`MAX_PIXELS` pixels.

        Args:
            shape: of the image or array; an axis of up to four at either end counts as its channels.

        Raises:
            FiseditError: there are too many pixels.
        """
        pixels = math.prod(shape)
        if len(shape) > 2 and pixels > MAX_PIXELS:
            pixels //= max([1, *(size for size in (shape[0], shape[-1]) if size <= 4)])
        if pixels > MAX_PIXELS:
            raise self.error(
                f"the {self.noun} has {' x '.join(map(str, shape))} pixels, more than the {MAX_PIXELS} that are read; "
                "scale it down first"
            )

    @contextmanager
    def guard(self, remedy: str) -> Iterator[None]:
        """Turn whatever a decoder raises into this purpose's error.

        The breadth is meant: on damaged files Pillow's and numpy's parsers raise nearly every built-in exception
        (``struct.error``, ``SyntaxError``, ``KeyError``, ``MemoryError``, ...), and warnings if a filter says so.
        """
        try:
            yield
        except FiseditError:
            raise
        except Exception as error:
            raise self.error(f"the {self.noun} cannot be read: {_reason(error)}; {remedy}") from error


def _reason(error: Exception) -> str:
    """One line of an exception, whatever it holds."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate cannot be printed
    return line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 3] + "..."


MASK = Purpose("mask", MaskError, "[height, width] of bool, uint8 or float")
PICTURE = Purpose("picture", PictureError, "[height, width, 3] of uint8 or float")
