"""Which parts there are, and how each is compiled: the registry that Editors and :func:`~.parts.use` read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import nn

import fisedit_compiler.api
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import CaptureError, ConfigError
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.decoding.decoder import refusal
from fisedit_compiler.pipelines.decoding.vae import SparseVAE

UNET = "unet"
"""The part that every step calls; reports and masks are about its calls."""
DECODER = "vae.decoder"
"""The part that makes the picture of the last latents."""


class PartRecording(Protocol):
    """What a part recorded in one run."""

    @property
    def num_calls(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def own_nbytes(self) -> int: ...


class PartSession(Protocol):
    """A part's run of edits."""

    @property
    def results(self) -> Sequence[PartRecording]: ...
    def set_mask(self, mask: Any, *, densely: str | None = None) -> None: ...


class CompiledPart(Protocol):
    """A module with the modes of one that ``sparsify`` returned."""

    @property
    def sparsify_config(self) -> SparsifyConfig: ...
    def record(self) -> AbstractContextManager[Any]: ...
    def edit(
        self, recording: Any, mask: Any = None, *, record: bool = False, copies: int = 1
    ) -> AbstractContextManager[Any]: ...


Compile = Callable[[nn.Module, SparsifyConfig], CompiledPart]


@dataclass(frozen=True)
class Part:
    """One kind of part.

    Attributes:
        name: the way to the module from the pipeline, attributes joined by dots; also the name of its recording.
        compiled: compiles the module with the Editor's configuration.
        keeps_maps: whether it has cross-attention maps to record.
        place: the way to what is exchanged, if that is a module around it; empty if it is not.
        optional: whether the pipeline goes on without it, after a warning, where the module cannot be compiled, and
            with another one that is put in its place.
    """

    name: str
    compiled: Compile
    keeps_maps: bool = False
    place: str = ""
    optional: bool = False

    @property
    def way(self) -> str:
        """The way from the pipeline to what is exchanged."""
        return self.place or self.name

    def find(self, pipe: Any) -> Any:
        """The module in a pipeline; ``None`` if that has none there."""
        return functools.reduce(lambda owner, name: getattr(owner, name, None), self.way.split("."), pipe)

    def put(self, pipe: Any, module: nn.Module) -> None:
        """Put a module in its place."""
        *way, last = self.way.split(".")
        setattr(functools.reduce(getattr, way, pipe), last, module)


PARTS: dict[str, Part] = {}


def register_part(
    name: str, *, keeps_maps: bool = False, place: str = "", optional: bool = False
) -> Callable[[Compile], Compile]:
    """Decorator of the function that compiles a part; it makes the part known to Editors made from then on.

    Its module is edited in the latent's lattice: its spatial input has the latents' height and width. The decorated
    function gets the module and the Editor's configuration, and may change the latter for its module.

    Args:
        name: the way to the module from the pipeline, such as ``"vae.decoder"``.
        keeps_maps: whether the module has cross-attention maps to record.
        place: the way to a module around it that the function gets and returns compiled, such as ``"vae"``.
        optional: whether pipelines go on, after a warning, if the module cannot be compiled, and may exchange it.

    Raises:
        ConfigError: the part is known already.
    """
    if name in PARTS:
        raise ConfigError(f"there is a part {name!r} already")

    def register(compiled: Compile) -> Compile:
        PARTS[name] = Part(name, compiled, keeps_maps, place, optional)
        return compiled

    return register


@register_part(UNET, keeps_maps=True)
def _compiled_unet(module: nn.Module, config: SparsifyConfig) -> SparseModule:
    return fisedit_compiler.api.sparsify(module, config)


@register_part(DECODER, place="vae", optional=True)
def _compiled_decoder(module: nn.Module, config: SparsifyConfig) -> CompiledPart:
    if why := refusal(module):
        raise CaptureError(why)
    return SparseVAE(module, config)


def is_compiled(module: Any) -> TypeGuard[CompiledPart]:
    """Whether a module has the modes of one that ``sparsify`` returned."""
    return callable(getattr(module, "record", None)) and callable(getattr(module, "edit", None))


def usual_parts(pipe: Any, config: SparsifyConfig) -> tuple[str, ...]:
    """The names of the parts that an Editor compiles by itself.

    The decoder is one on a GPU where code is made for it: the picture of an edit takes a few milliseconds then instead
    of as long as a dozen calls of the UNet. Elsewhere an edit would have to be made again many times before that pays
    for what its compilation and its recording take.
    """
    models = [pipe.unet, getattr(pipe, "vae", None)]
    first = [next(iter(model.parameters()), None) for model in models if isinstance(model, nn.Module)]
    on_gpu = len(first) == len(models) and all(value is not None and value.device.type == "cuda" for value in first)
    return (UNET, DECODER) if on_gpu and config.backend_on("cuda") == "inductor" else (UNET,)


def chosen_parts(names: Sequence[str] | None) -> list[Part]:
    """The parts of these names, all if left out.

    Raises:
        ConfigError: there is no such part, or the UNet is not among them.
    """
    if names is None:
        return list(PARTS.values())
    known = ", ".join(map(repr, PARTS))
    if isinstance(names, str) or not isinstance(names, Collection) or any(name not in PARTS for name in names):
        raise ConfigError(
            f"parts={names!r}: pass a tuple of parts that are known: {known}; an Editor takes 'usual', too, for those "
            "that pay on its device"
        )
    if UNET not in names:
        raise ConfigError(f"parts={tuple(names)!r}: the UNet is always compiled; pass ({UNET!r},) for it alone")
    return [part for name, part in PARTS.items() if name in names]
