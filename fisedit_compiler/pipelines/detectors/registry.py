"""Mask detectors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.pipelines.detectors.base import MaskDetector

Detector = TypeVar("Detector", bound=type[MaskDetector])

DEFAULT = "early-difference"
"""The detector of ``mask=None`` and ``mask="auto"``."""
_AUTOMATIC = "auto"
_DETECTORS: dict[str, type[MaskDetector]] = {}


def register_mask_detector(name: str) -> Callable[[Detector], Detector]:
    """Class decorator that makes a :class:`MaskDetector` known as ``mask=name``.

    The class must be constructible without arguments.

    Raises:
        ConfigError: the name is taken, or looks like the path of an image.
    """

    if name in _DETECTORS or name == _AUTOMATIC:
        raise ConfigError(f"there is a mask detector {name!r} already; choose another name")
    if "." in name or "/" in name or "\\" in name:
        raise ConfigError(f"the detector name {name!r} looks like a file; use letters, digits and hyphens")

    def register(detector: Detector) -> Detector:
        detector.name = name
        _DETECTORS[name] = detector
        return detector

    return register


def mask_detectors() -> tuple[str, ...]:
    """Names of the registered detectors, the default one first."""
    return tuple(sorted(_DETECTORS, key=lambda name: (name != DEFAULT, name)))


def is_detector_name(name: object) -> bool:
    """Whether ``mask=name`` asks for a detector rather than for a file."""
    return isinstance(name, str) and (name == _AUTOMATIC or name in _DETECTORS)


def make_mask_detector(name: str = DEFAULT) -> MaskDetector:
    """A detector by name, with its default settings.

    Raises:
        ConfigError: nobody registered that name.
    """
    if not is_detector_name(name):
        raise ConfigError(f"there is no mask detector {name!r}; there are {', '.join(mask_detectors())}")
    return _DETECTORS[DEFAULT if name == _AUTOMATIC else name]()
