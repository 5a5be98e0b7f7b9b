"""A tiny random Stable Diffusion pipeline, others of diffusers around it, and a stand-in for the compiled UNet.

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
from PIL import Image

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.models import embedded_model_path
from fisedit_compiler.runtime.sessions.edit_masks import EditMasks

STEPS = 7
PICTURE = Image.effect_mandelbrot((32, 32), (-2.0, -1.5, 1.0, 1.5), 50).convert("RGB")


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


# -- other pipelines of diffusers, each with the further arguments that a call needs --------------------


def sdxl() -> tuple[Any, dict[str, Any]]:
    """Two text encoders of one tokenizer, pooled text and sizes as added conditions."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = make_tiny_pipeline().components
    torch.manual_seed(1)
    config = parts["text_encoder"].config
    config.projection_dim = config.hidden_size
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=48, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=parts["vae"], text_encoder=CLIPTextModel(config).eval(), tokenizer=parts["tokenizer"],
        text_encoder_2=CLIPTextModelWithProjection(config).eval(), tokenizer_2=parts["tokenizer"], unet=unet.eval(),
        scheduler=parts["scheduler"], add_watermarker=False,
    )  # fmt: skip
    return pipe, {}


def controlnet() -> tuple[Any, dict[str, Any]]:
    """A ControlNet whose residuals are not zero, and its picture."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    parts = make_tiny_pipeline().components
    torch.manual_seed(1)
    # The hint comes at the picture's size, twice the latents'; a ControlNet brings it down once per further width.
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in control.parameters():  # its zero convolutions would hide the residuals
        torch.nn.init.normal_(parameter, std=0.05)
    parts.pop("image_encoder", None)
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    return pipe, {"image": PICTURE, "controlnet_conditioning_scale": 0.7}


def inpaint(channels: int = 4) -> tuple[Any, dict[str, Any]]:
    """Inpainting; with a UNet of four channels the pipeline itself puts the picture back outside its own mask."""
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    parts = make_tiny_pipeline().components
    parts.pop("image_encoder", None)
    if channels != 4:
        torch.manual_seed(1)
        parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=channels).eval()
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    hole = Image.new("L", (32, 32))
    hole.paste(255, (4, 4, 28, 28))
    return pipe, {"image": PICTURE, "mask_image": hole}


def guided_by_embedding(pipe: Any) -> Any:
    """The pipeline, its UNet told the weight of guidance (``timestep_cond``) as distilled models are."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=256).eval()
    torch.nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight, std=0.2)  # or the weight would hardly count
    return pipe


def latent_consistency() -> tuple[Any, dict[str, Any]]:
    """The pipeline that was made for LCM: no negative prompt, and it decodes what the scheduler calls denoised."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = guided_by_embedding(make_tiny_pipeline()).components
    parts.pop("image_encoder", None)
    parts["scheduler"] = LCMScheduler.from_config(parts["scheduler"].config)
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False), {}
