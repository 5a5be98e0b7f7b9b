"""A tiny random Stable Diffusion pipeline, and a stand-in for the compiled UNet.

The stand-in has the runtime's interface and the simplest program that keeps its promises: it runs the whole
UNet and overwrites the prediction outside the mask by the recorded one. So the Editor is tested apart from
the compiler, and a test that fails with both is the Editor's fault.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.models import embedded_model_path
from fisedit_compiler.runtime.sessions.edit_masks import EditMasks

STEPS = 7


class PinnedRecording:
    """Samples and predictions of every call."""

    def __init__(self) -> None:
        self.samples: list[torch.Tensor] = []
        self.predictions: list[torch.Tensor] = []

    @property
    def num_calls(self) -> int:
        return len(self.samples)

    num_maps = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.predictions)

    @property
    def own_nbytes(self) -> int:
        return self.nbytes

    def add(self, sample: torch.Tensor, prediction: torch.Tensor) -> None:
        self.samples.append(sample.clone())
        self.predictions.append(prediction.clone())


class PinnedSession:
    """One edit run."""

    def __init__(self, base: PinnedRecording, masks: EditMasks | None) -> None:
        self.base = base
        self.mask = None if masks is None else masks.grown
        self.recording = PinnedRecording()
        self.results: tuple[PinnedRecording, ...] = ()
        self.timings: list[tuple[str, float]] = []
        self.fallback: str | None = None

    @property
    def call(self) -> int:
        return len(self.timings)

    @property
    def computed_samples(self) -> list[int]:
        return [2] * self.call

    def set_mask(self, masks: EditMasks, *, densely: str | None = None) -> None:
        self.mask = masks.grown

    def pin(self, sample: torch.Tensor, prediction: torch.Tensor, checks: bool) -> torch.Tensor:
        base_sample = self.base.samples[self.call]
        if self.mask is not None:
            if checks and not torch.equal(sample[..., ~self.mask], base_sample[..., ~self.mask]):
                raise RecordingError(f"call {self.call}: the sample outside the mask is not the recorded one")
            pixels = prediction.shape[-1] // self.mask.shape[-1]  # a decoder's output is larger than its input
            mask = self.mask.repeat_interleave(pixels, -2).repeat_interleave(pixels, -1)
            prediction = torch.where(mask, prediction, self.base.predictions[self.call])
        return prediction


class PinnedUNet(torch.nn.Module):
    """Stands for the module ``sparsify`` returns."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.original = original
        self.sparsify_config = SparsifyConfig()
        self.target: PinnedRecording | PinnedSession | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    @contextmanager
    def record(self, maps: int = 0) -> Iterator[PinnedRecording]:
        recording = PinnedRecording()
        with self._mode(recording):
            yield recording

    @contextmanager
    def edit(
        self, recording: PinnedRecording, mask: EditMasks | None = None, record: bool = False, copies: int = 1
    ) -> Iterator[PinnedSession]:
        assert copies == 1, "the stand-in makes one edit at a time"
        session = PinnedSession(recording, mask)
        with self._mode(session):
            yield session
        session.results = (session.recording,) if record else ()

    @contextmanager
    def _mode(self, target: PinnedRecording | PinnedSession) -> Iterator[None]:
        assert self.target is None, "a mode was left open"
        self.target = target
        try:
            yield
        finally:
            self.target = None

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = self.original(sample, *args, **kwargs)
        plain = isinstance(output, torch.Tensor)  # the decoder's
        if isinstance(self.target, PinnedRecording):
            self.target.add(sample, output if plain else output[0])
        elif isinstance(self.target, PinnedSession):
            session = self.target
            prediction = session.pin(sample, output if plain else output[0], checks=not plain)
            session.recording.add(sample, prediction)
            kind = "dense" if session.mask is None else "sparse"
            session.timings.append((kind, time.perf_counter() - started))
            return prediction if plain else (prediction,)
        return output


def make_tiny_pipeline() -> Any:
    """Random weights, the embedded tokenizer, 16 x 16 latents of 32 x 32 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(embedded_model_path("emoji-scenes") / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
