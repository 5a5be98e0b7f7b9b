"""A VAE with the modes of a compiled UNet: it records what it decodes, and decodes edits sparsely.

In a mode it encodes a picture once, whichever run asks (``encodings.py``).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fisedit_compiler.compiling import computing
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import ModeError
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.decoding.decoder import compiled_decoder
from fisedit_compiler.pipelines.decoding.encodings import Encodings
from fisedit_compiler.pipelines.decoding.runs import Decoded, DecodeEdit, DecodeRecord

logger = logging.getLogger(__name__)


class SparseVAE(nn.Module):
    """The user's VAE, whose ``decode`` follows the mode that the calling thread or task has entered.

    Everything else is the original's: attributes are read from it and written to it, ``to`` casts it, and what was
    saved with it is saved. In no mode ``decode`` is the original's, too.

    Attributes:
        original: the user's VAE, unpatched.
        decoding: its decoder, compiled.
        encodings: of the pictures that were encoded last.
        sparsify_config: the configuration the decoder was compiled with.
        refused: why nothing is decoded sparsely any more, in words; empty as long as it is.
        wanted: bytes of its recordings by batch, height and width, as far as they were asked for.
    """

    original: Any
    decoding: SparseModule
    encodings: Encodings
    refused: str
    wanted: dict[tuple[int, int, int], int]

    def __init__(self, original: Any, config: SparsifyConfig) -> None:
        """Compile the decoder.

        Raises:
            CaptureError: it cannot be captured.
        """
        super().__init__()
        self._modules["original"] = original
        own: dict[str, Any] = vars(self)
        own["config_beside"] = config
        own["decoding"] = compiled_decoder(original, config)  # no submodule: its parameters are the original's
        own["encodings"] = Encodings(original)
        own["refused"], own["wanted"] = "", {}
        own["_run"] = ContextVar[Any]("fisedit_decoding", default=None)
        own["training"] = original.training
        own["__module__"] = type(original).__module__

    @property
    def sparsify_config(self) -> SparsifyConfig:
        return self.decoding.sparsify_config

    # -- calls -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward: it encodes and decodes, in no mode."""
        return self.original(*args, **kwargs)

    def decode(self, z: Tensor, return_dict: bool = True, **options: Any) -> Any:
        """The original's ``decode``, or the active mode's version of it; same arguments, same output type."""

        def dense(latents: Tensor) -> Tensor:
            with computing():
                pixels: Tensor = self.original.decode(latents, return_dict=False, **options)[0]
            return pixels

        run = self._active()
        pixels = dense(z) if run is None else run.decode(z, dense)
        if not return_dict:
            return (pixels,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=pixels)

    def encode(self, x: Tensor, return_dict: bool = True, **options: Any) -> Any:
        """The original's ``encode``; in a mode, what that made of an equal picture before. Same output type."""
        run = self._active()
        if run is None or options or "encode" in vars(self.original):
            return self.original.encode(x, return_dict=return_dict, **options)

        def own(pixels: Tensor) -> Any:
            with computing():
                return self.original.encode(pixels, return_dict=False)[0]

        found = self.encodings.of(run, x, own)
        if not return_dict:
            return (found,)
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        return AutoencoderKLOutput(latent_dist=found)

    # -- modes -----------------------------------------------------------------------------------

    @contextmanager
    def record(self) -> Iterator[Decoded]:
        """Record what is decoded inside the block.

        Raises:
            ModeError: another mode is active in this thread or task.
        """
        run = DecodeRecord(self)
        with self._entered(run):
            yield run.decoded
        run.decoded.complete = True

    @contextmanager
    def edit(
        self, recording: Decoded, mask: Any = None, *, record: bool = False, copies: int = 1
    ) -> Iterator[DecodeEdit]:
        """Decode edits of what was recorded: inside their masks and a border, with the base's pixels around.

        Args:
            recording: of the base.
            mask: as ``SparseModule.edit`` takes it; until one is set everything is decoded.
            record: whether what is decoded is recorded in turn.
            copies: how many edits are made at once.

        Raises:
            ModeError: another mode is active in this thread or task.
            MaskError: the mask does not fit.
        """
        run = DecodeEdit(self, recording, record, copies)
        if mask is not None:
            run.set_mask(mask)
        with self._entered(run):
            yield run
        run.finish()

    def refuse(self, why: str) -> None:
        """Decode densely from now on, after one warning that says why."""
        if not self.refused:
            vars(self)["refused"] = why
            logger.warning("the VAE decodes densely from now on: %s", why)

    @contextmanager
    def _entered(self, run: DecodeRecord | DecodeEdit) -> Iterator[None]:
        if self._active() is not None:
            raise ModeError("This VAE is in a run already. Modes do not nest: leave the first block before the next.")
        # The block holds the run: should an interrupt skip what stands below, nobody does.
        self._run.set(weakref.ref(run))
        try:
            yield
        finally:
            self._run.set(None)

    def _active(self) -> Any:
        reference = self._run.get()
        return None if reference is None else reference()

    # -- being the original ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_modules", {}).get("original")
        if original is None or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)  # also a method of its own that somebody wraps, such as decode
        else:
            setattr(original, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """The original's class, for ``isinstance`` and diffusers' ``save_pretrained``; ``type()`` tells the truth."""
        original = self.__dict__.get("_modules", {}).get("original")
        return SparseVAE if original is None else type(original)

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseVAE, (self.original, self.config_beside)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict, with the original's keys."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights into the original VAE."""
        return self.original.load_state_dict(*args, **kwargs)
