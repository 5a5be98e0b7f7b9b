"""Questions the Editor asks a pipeline and a prompt before it runs anything.

Every function here either answers or raises an error with the remedy; none of them runs a model.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
import numbers
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fisedit_compiler.errors import ConfigError, FiseditError, PromptError, RecordingError
from fisedit_compiler.pipelines.editing.runs import Generation

_LONGEST_BELIEVABLE_CONTEXT = 100_000
_EXAMPLES = {"seed": 7, "num_inference_steps": 25, "height": 512, "width": 512}
_GIVEN = (
    "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "generator", "latents",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type",
)  # fmt: skip
"""Arguments of a pipeline's call that every run gives it."""
_INSTEAD = {
    "generator": "pass seed= beside options",
    "latents": "pass seed= beside options, or start from a picture with Editor.load()",
    "output_type": "the result has the picture as `image` and its latents as `latents`",
    **dict.fromkeys(
        ("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
        "the result has the latents after every step as `latents`; for a callback of your own run the pipeline itself "
        "inside compiled.record() and compiled.edit()",
    ),
}
"""What to do instead of giving one of them as an option; the others are arguments of the Editor's own."""
_NOT_EVERYWHERE = ("negative_prompt",)
"""Those that a pipeline may lack: one whose guidance is embedded computes nothing for a negative prompt."""
_REFUSED = ("return_dict", "num_images_per_prompt", "prompt_embeds", "negative_prompt_embeds")
"""Those that would change what a run is: one picture of one prompt."""
_TAKES = {"timesteps": "LCM, TCD, Euler or DPM++", "sigmas": "Euler or UniPC"}
"""Schedulers that take noise levels of the caller's, by the option."""
_SETS_STEPS = frozenset({"set_timesteps", "retrieve_timesteps"})
"""Functions of schedulers and pipelines in which a schedule is laid out."""
_OF_EIGHTS = ("pipeline_stable_diffusion", "pipeline_stable_diffusion_xl", "pipeline_latent_consistency_text2img")
"""Files of diffusers whose pipelines take multiples of eight pixels only, whatever their VAE."""
DENOISED = "denoised"
"""What a latent consistency pipeline calls the second result of a scheduler's step; it decodes that of the last one."""
_BOTH_ALIKE = "LCMScheduler"
"""The scheduler whose last step draws no noise, so that both of its results are one tensor."""


def check_pipeline(pipe: Any) -> None:
    """Refuse pipelines the Editor cannot drive.

    Raises:
        ConfigError: no ``unet``, no step callback that hands out the latents, or no way to start from given ones.
    """
    name = type(pipe).__name__
    if getattr(pipe, "unet", None) is None:
        raise ConfigError(f"{name} has no `unet`; the Editor drives Stable-Diffusion-like diffusers pipelines")
    if "latents" not in getattr(pipe, "_callback_tensor_inputs", ()):
        raise ConfigError(
            f"{name} does not hand `latents` to `callback_on_step_end`; use compiled.record() and "
            "compiled.edit() with it directly"
        )
    arguments = _arguments(pipe)
    needed = [argument for argument in _GIVEN if argument not in _NOT_EVERYWHERE]
    missing = [] if arguments is None else [argument for argument in needed if argument not in arguments]
    if missing:
        raise ConfigError(
            f"{name} takes no {', '.join(map(repr, missing))}, which the Editor's runs need; use compiled.record() and "
            "compiled.edit() with it directly, or Editor.load() with a text-to-image pipeline of the same parts"
        )


def check_numbers(seed: object, num_inference_steps: object, guidance_scale: object, *sizes: object) -> None:
    """Refuse settings of a run that are no numbers of their kind.

    Raises:
        ConfigError: names the setting.
    """
    whole = [("seed", seed, 0), ("num_inference_steps", num_inference_steps, 1)]
    whole += [(name, size, 1) for name, size in zip(("height", "width"), sizes, strict=True) if size is not None]
    for name, value, least in whole:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ConfigError(f"{name}={value!r} is no whole number; pass an int, such as {name}={_EXAMPLES[name]}")
        if not least <= int(value) < 2**63:
            raise ConfigError(f"{name}={value!r} must be {least} or more, and below 2**63")
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, numbers.Real):
        raise ConfigError(f"guidance_scale={guidance_scale!r} is no number; pass a float, 1 or less for no guidance")
    if not math.isfinite(guidance_scale):
        raise ConfigError(f"guidance_scale={guidance_scale!r} is not finite")


def check_size(pipe: Any, height: int | None, width: int | None) -> None:
    """Refuse a size that a pipeline does not make; ``None`` is its own.

    Raises:
        ConfigError: names the side, and what it has to be a multiple of.
    """
    multiple = int(getattr(pipe, "vae_scale_factor", 1))
    checks = getattr(type(pipe), "check_inputs", None)
    package, *_, file = str(getattr(checks, "__module__", "")).split(".")
    if package == "diffusers" and file in _OF_EIGHTS:
        multiple = math.lcm(multiple, 8)
    for name, size in (("height", height), ("width", width)):
        if size is not None and size % multiple:
            raise ConfigError(f"{name}={size} is no size of this pipeline's pictures: pass a multiple of {multiple}")


def check_base(base: object) -> None:
    """Refuse what no edit can start from.

    Raises:
        ConfigError: it is no result of the Editor.
    """
    if not isinstance(base, Generation):
        raise ConfigError(
            f"an edit starts from what generate(), load() or an edit returned, got an object of type "
            f"{type(base).__name__}; pass `base` itself, not its image or prompt, as the first argument"
        )


def check_options(pipe: Any, options: Mapping[str, Any]) -> None:
    """Refuse further arguments of the pipeline's call that it does not take, or that the Editor gives it itself.

    Raises:
        ConfigError: names the argument.
    """
    arguments = _arguments(pipe)
    known = [name for name in arguments or () if name not in (*_GIVEN, *_REFUSED)]
    for name in options:
        if name in _GIVEN:
            instead = _INSTEAD.get(name, f"pass {name}= beside options")
            raise ConfigError(f"options[{name!r}]: the Editor gives the pipeline its {name!r} itself; {instead}")
        if name in _REFUSED:
            raise ConfigError(f"options[{name!r}]: a run of the Editor makes one picture of one prompt; leave it out")
        if arguments is not None and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else f"; it takes {', '.join(known)}"
            raise ConfigError(f"options[{name!r}]: {type(pipe).__name__} takes no such argument{meant}")


def check_schedule(scheduler: Any, options: Mapping[str, Any]) -> None:
    """Refuse noise levels of the caller's that a scheduler does not take.

    Raises:
        ConfigError: names the option and the scheduler.
    """
    for name in ("timesteps", "sigmas"):
        given = options.get(name) is not None
        if given and name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ConfigError(
                f"options[{name!r}]: {type(scheduler).__name__} takes no {name} of one's own; leave them out, or use a "
                f"scheduler that does, such as {_TAKES[name]}"
            )


@contextmanager
def naming_schedule(scheduler: Any, num_inference_steps: int) -> Iterator[None]:
    """Say of errors from inside a scheduler that lays out its steps what they are about.

    Raises:
        ConfigError: it does not take so many steps, or the noise levels of the caller's.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        if isinstance(error, FiseditError) or not any(frame.f_code.co_name in _SETS_STEPS for frame, _ in frames):
            raise
        raise ConfigError(
            f"{type(scheduler).__name__} refuses a schedule of num_inference_steps={num_inference_steps} with the "
            f"given options: {str(error).removesuffix('.')}. Ask for fewer steps, or change timesteps, sigmas or "
            "original_inference_steps in options"
        ) from error


def check_guidance(pipe: Any, options: Mapping[str, Any]) -> None:
    """Refuse guidance that reads all sites between two UNet calls: an edit would move what lies outside its mask.

    Raises:
        ConfigError: it is rescaled.
    """
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_rescale")
    default = 0.0 if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    if options.get("guidance_rescale", default):
        raise ConfigError(
            f"guidance_rescale={options.get('guidance_rescale', default)} divides by a deviation over all sites, so an "
            "edit would change what lies outside its mask; use options={'guidance_rescale': 0.0}, for zero "
            "terminal SNR a lower guidance_scale"
        )


def takes_negative_prompts(pipe: Any) -> bool:
    """Whether a pipeline's call has an argument for one."""
    arguments = _arguments(pipe)
    return arguments is None or "negative_prompt" in arguments


def decodes_another(pipe: Any) -> bool:
    """Whether a pipeline decodes the second result of the scheduler's last step, not its latents."""
    return DENOISED in getattr(pipe, "_callback_tensor_inputs", ())


def check_scheduler(pipe: Any) -> None:
    """Refuse a scheduler that no edit can follow; asked before every recorded run.

    Raises:
        ConfigError: it reads all sites between two UNet calls, so that an edit would move what lies outside its mask;
            or the pipeline decodes something else than latents, and it is not one whose last step gives both alike.
    """
    scheduler = pipe.scheduler
    if decodes_another(pipe) and _BOTH_ALIKE not in (one.__name__ for one in type(scheduler).__mro__):
        raise ConfigError(
            f"{type(pipe).__name__} decodes what its scheduler predicts beside the latents, and "
            f"{type(scheduler).__name__} is not known to end with both alike; use {_BOTH_ALIKE}, or a "
            "StableDiffusionPipeline of the same parts, which takes the same embedded guidance"
        )
    if dict(getattr(scheduler, "config", {})).get("thresholding"):
        raise ConfigError(
            f"{type(scheduler).__name__} has thresholding=True, which divides by a quantile over all sites, so an "
            "edit would change what lies outside its mask; make the scheduler with thresholding=False"
        )


def check_prompt(pipe: Any, prompt: object, what: str = "prompt") -> str:
    """Return ``prompt`` if every tokenizer of ``pipe`` reads all of it.

    Raises:
        PromptError: not a string, or longer than a tokenizer's limit; names the words that would be cut off.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"the {what} is of type {type(prompt).__name__}; the Editor takes one string per run")
    for attribute in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, attribute, None)
        if tokenizer is None:
            continue
        limit = _token_limit(pipe, tokenizer, attribute)
        if limit is not None and _num_tokens(tokenizer, prompt) > limit:
            raise _too_long(tokenizer, prompt, limit, what)
    return prompt


def check_negative_prompt(pipe: Any, prompt: object) -> str:
    """The same of what a run is guided away from.

    Raises:
        PromptError: as there, or the pipeline takes none.
    """
    checked = check_prompt(pipe, prompt, "negative prompt")
    if checked and not takes_negative_prompts(pipe):
        raise PromptError(
            f"{type(pipe).__name__} takes no negative prompt: its guidance is embedded, and nothing is computed for "
            "one; leave negative_prompt out"
        )
    return checked


def check_negative_prompts(pipe: Any, prompts: Sequence[str | None]) -> None:
    """Refuse negative prompts that cannot be in one run: in some pipelines none is not the same as an empty one.

    Raises:
        PromptError: some edits have none, and the pipeline gives the UNet zeros for that, all edits or no edit.
    """
    missing = [number for number, prompt in enumerate(prompts) if prompt is None]
    if (
        missing
        and len(missing) < len(prompts)
        and getattr(getattr(pipe, "config", None), "force_zeros_for_empty_prompt", False)
    ):
        raise PromptError(
            f"edit {missing[0] + 1} of {len(prompts)} has no negative prompt and others have one: "
            f"{type(pipe).__name__} takes zeros in its place for all pictures of a run or for none "
            "(force_zeros_for_empty_prompt); give negative prompts to all edits or to none, or make two batches"
        )


def scheduler_fingerprint(scheduler: Any) -> str:
    """Class and configuration of a scheduler as text; equal for schedulers that walk the same path."""
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return f"{type(scheduler).__name__} {json.dumps(config, sort_keys=True, default=str)}"


def check_same_scheduler(expected: str, scheduler: Any, num_inference_steps: int) -> None:
    """Refuse a scheduler other than the base's.

    Some schedulers write their own settings when they are told the number of steps, so a run that the user made in
    between may have changed what the user did not. Settings that lead to the same ones then are the same.

    Raises:
        RecordingError: names the settings that differ.
    """
    found = scheduler_fingerprint(scheduler)
    if found == expected or _walk_alike(expected, scheduler, num_inference_steps):
        return
    old_name, old_config = expected.split(" ", 1)
    new_name, new_config = found.split(" ", 1)
    if old_name != new_name:
        change = f"the base was made with {old_name}, the pipeline now has {new_name}"
    else:
        old, new = json.loads(old_config), json.loads(new_config)
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        change = f"{old_name} was changed since the base was made: " + ", ".join(
            f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys
        )
    raise RecordingError(f"{change}; put the base's scheduler back, or generate the base again with this one")


def _walk_alike(expected: str, scheduler: Any, num_inference_steps: int) -> bool:
    name, config = expected.split(" ", 1)
    if name != type(scheduler).__name__:
        return False
    try:
        base, now = type(scheduler).from_config(json.loads(config)), copy.deepcopy(scheduler)
        for one in (base, now):
            one.set_timesteps(num_inference_steps)
        return scheduler_fingerprint(base) == scheduler_fingerprint(now)
    except Exception:  # not to be asked this way: what differs is named instead
        return False


def check_same(name: str, wanted: object, base: object) -> None:
    """Refuse an option that must be the base's, if it was given and differs.

    Raises:
        ConfigError: ``wanted`` is neither ``None`` nor equal to ``base``.
    """
    if wanted is not None and wanted != base:
        raise ConfigError(
            f"{name}={wanted!r}, but the base was made with {base!r} and an edit follows its base step by "
            f"step; leave {name} out, or generate a new base with {name}={wanted!r}"
        )


def _arguments(pipe: Any) -> list[str] | None:
    """The names that a pipeline's call takes; ``None`` if it passes everything on to another.

    ``**kwargs`` beside names is not believed: stock pipelines have it for arguments of the past and ignore the rest.
    """
    found = list(inspect.signature(type(pipe).__call__).parameters.values())[1:]
    names = [one.name for one in found if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    passes_on = any(one.kind is one.VAR_KEYWORD for one in found) and not set(names) & set(_GIVEN)
    return None if passes_on else names


def _token_limit(pipe: Any, tokenizer: Any, attribute: str) -> int | None:
    limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
    if 0 < limit < _LONGEST_BELIEVABLE_CONTEXT:
        return limit
    # Tokenizers saved without a limit report about 1e30; the text encoder's table of positions is the real
    # one.
    encoder = getattr(pipe, attribute.replace("tokenizer", "text_encoder"), None)
    return getattr(getattr(encoder, "config", None), "max_position_embeddings", None)


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


def _too_long(tokenizer: Any, prompt: str, limit: int, what: str) -> PromptError:
    words = prompt.split()
    kept = len(words)
    while kept and _num_tokens(tokenizer, " ".join(words[:kept])) > limit:
        kept -= 1
    return PromptError(
        f"the {what} has {_num_tokens(tokenizer, prompt)} tokens and the text encoder reads {limit}; it "
        f"would not see {' '.join(words[kept:])!r}. Shorten the {what}"
    )
