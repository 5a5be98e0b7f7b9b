"""What edits of one base are asked for, argument by argument: one for all edits, or one each; checked once.

``edit()`` asks for one edit and ``edit_many()`` for several; both become requests here, by the same checks. What all
edits share is looked at once and its mistakes are told as they are; a mistake in what one edit has of its own names
the edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from fisedit_compiler.config import Reuse, check_reuse
from fisedit_compiler.errors import ConfigError, FiseditError, MaskError, PromptError, RecordingError
from fisedit_compiler.masks.feather import check_feather
from fisedit_compiler.masks.shapes import is_numbers
from fisedit_compiler.pipelines.detectors import MaskDetector
from fisedit_compiler.pipelines.editing import refusals
from fisedit_compiler.pipelines.editing.region import listed, region_argument
from fisedit_compiler.pipelines.editing.request import EditRequest, detection_steps, mask_source, naming_edit, within
from fisedit_compiler.pipelines.editing.runs import Generation

T = TypeVar("T")
R = TypeVar("R")
U = TypeVar("U")


@dataclass(frozen=True)
class Each(Generic[T]):
    """One argument of some edits.

    Attributes:
        values: one for each edit.
        is_one: whether they are one and the same.
    """

    values: tuple[T, ...]
    is_one: bool

    @classmethod
    def one(cls, value: T, count: int = 1) -> Each[T]:
        """The same for all edits."""
        return cls((value,) * count, True)

    def map(self, function: Callable[[T], R]) -> Each[R]:
        """The results of a function, which is called once if there is one value.

        Raises:
            FiseditError: as the function does; of several edits it names the one.
        """
        count = len(self.values)
        if self.is_one:
            return Each.one(function(self.values[0]), count)
        found = []
        for number, value in enumerate(self.values):
            with naming_edit(number, count):
                found.append(function(value))
        return Each(tuple(found), False)

    def with_(self, other: Each[U]) -> Each[tuple[T, U]]:
        """Pairs of two arguments."""
        pairs = tuple(zip(self.values, other.values, strict=True))
        return Each(pairs, self.is_one and other.is_one)


@dataclass(frozen=True)
class Asked:
    """The arguments of some edits, nothing checked yet; see ``Editor.edit`` for what each means."""

    prompts: Each[Any]
    negative_prompts: Each[Any]
    masks: Each[Any]
    boxes: Each[Any]
    polygons: Each[Any]
    feathers: Each[Any]
    dense_calls: Each[Any]

    @classmethod
    def of_one(
        cls, prompt: Any, negative_prompt: Any, mask: Any, box: Any, polygon: Any, feather: Any, dense_calls: Any
    ) -> Asked:
        """One edit's: a list of boxes is the boxes of that edit."""
        return cls(*map(Each.one, (prompt, negative_prompt, mask, box, polygon, feather, dense_calls)))

    @classmethod
    def of_many(
        cls, prompts: object, negative_prompt: Any, mask: Any, box: Any, polygon: Any, feather: Any, dense_calls: Any
    ) -> Asked:
        """Several edits': whatever is a sequence of its kind has one for each of them.

        Raises:
            FiseditError: there is no list of prompts, or another number of something than of prompts.
        """
        texts = _prompts(prompts)
        count = len(texts)

        def split(name: str, value: Any, is_one: bool, error: type[FiseditError], remedy: str = "") -> Each[Any]:
            if is_one:
                return Each.one(value, count)
            values = tuple(value)
            if len(values) == count:
                return Each(values, False)
            raise error(
                f"{len(values)} {name} were given for {count} prompt{'s' * (count != 1)}; pass one for all of them, or "
                f"one for each{remedy}"
            )

        boxes, polygons = listed(box), listed(polygon)
        several = " (several for one edit: a list of them in its place)"
        return cls(
            Each(texts, False),
            split("negative prompts", negative_prompt, not isinstance(negative_prompt, (list, tuple)), PromptError),
            split("masks", mask, not _is_several_masks(mask), MaskError, ", or none to find them"),
            split("boxes", boxes, not isinstance(boxes, list) or is_numbers(boxes), MaskError, several),
            split("polygons", polygons, _is_one_polygon(polygons), MaskError, several),
            split("values of feather", feather, not _is_values(feather), ConfigError),
            split("values of dense_calls", dense_calls, not _is_values(dense_calls), ConfigError),
        )


def requests(
    pipe: Any, base: Generation, asked: Asked, *, record: bool, reuse: Reuse | None, started: float
) -> list[EditRequest]:
    """The edits to make, their arguments checked.

    Args:
        pipe: the pipeline that will run them.
        base: what is edited.
        asked: the arguments.
        record: whether the edits can be edited in turn.
        reuse: whether calls may take values from earlier ones; ``None`` for what the configuration says.
        started: when the user asked, by ``time.perf_counter``.

    Raises:
        PromptError: a prompt is no string, or longer than the text encoder reads.
        MaskError: a mask, box or polygon does not fit, or some edits have a mask and others none.
        ConfigError: ``feather``, ``dense_calls`` or ``reuse`` out of range.
        RecordingError: the scheduler was changed, or the base was not recorded.
    """
    settings = base.settings
    if reuse is not None:
        check_reuse(reuse, "reuse")
    refusals.check_same_scheduler(settings.scheduler, pipe.scheduler, settings.num_inference_steps)
    prompts = asked.prompts.map(lambda prompt: refusals.check_prompt(pipe, prompt))
    negatives = asked.negative_prompts.map(lambda prompt: _negative(pipe, base, prompt))
    refusals.check_negative_prompts(pipe, negatives.values)
    if base.recording is None:
        raise RecordingError("this edit was made with record=False, so it cannot be edited; make it with record=True")
    feathers = asked.feathers.map(check_feather)
    regions = asked.boxes.with_(asked.polygons).map(lambda shapes: region_argument(*shapes, base))
    # Two maps: a mask that all edits share is read once, whatever boxes cut it.
    sources = asked.masks.map(lambda mask: mask_source(mask, base)).with_(regions).map(lambda pair: within(*pair))
    _check_alike([source for source, _ in sources.values])
    # A detector is one edit's, whoever gave it: it keeps what it has seen.
    steps = sources.with_(asked.dense_calls).map(
        lambda pair: detection_steps(pair[0][0].mask, pair[1], len(base.latents))
    )
    count = len(prompts.values)
    return [
        EditRequest(
            base=base,
            prompt=prompts.values[number],
            negative_prompt=negatives.values[number],
            source=source.name,
            mask=source.mask.fresh() if isinstance(source.mask, MaskDetector) else source.mask,
            dense_calls=steps.values[number],
            record=record,
            reuse=reuse,
            started=started,
            region=region,
            feather=feathers.values[number],
            number=number,
            asked_for=count,
        )
        for number, (source, region) in enumerate(sources.values)
    ]


def _prompts(prompts: object) -> tuple[Any, ...]:
    if isinstance(prompts, str):
        raise PromptError("edit_many() takes a list of prompts, got one string; use edit() for one prompt")
    if not isinstance(prompts, Sequence):
        raise PromptError(f"edit_many() takes a list of prompts, got an object of type {type(prompts).__name__}")
    if not prompts:
        raise PromptError("edit_many() got no prompts; pass at least one")
    return tuple(prompts)


def _negative(pipe: Any, base: Generation, prompt: Any) -> str | None:
    chosen = base.negative_prompt if prompt is None else prompt
    return None if chosen is None else refusals.check_negative_prompt(pipe, chosen)


def _check_alike(sources: Sequence[Any]) -> None:
    """Refuse given masks beside masks to be found.

    All edits go through the UNet in one call, and that call is dense as long as a mask is looked for: an edit whose
    mask is known would be computed densely where alone it reads the recording, and come out as another.
    """
    automatic = [isinstance(source.mask, MaskDetector) for source in sources]
    if len(set(automatic)) > 1:
        number = automatic.index(not automatic[0])
        raise MaskError(
            "some prompts have a mask and others none: those to be found need dense calls for the whole batch; give "
            "masks to all prompts or to none, or make two batches "
            f"(edit {number + 1} of {len(sources)} has {'none' if automatic[number] else 'one'})"
        )


def _is_several_masks(mask: Any) -> bool:
    if isinstance(mask, (torch.Tensor, np.ndarray)):
        return (mask.ndim == 3 and mask.shape[0] != 1) or (mask.ndim == 4 and mask.shape[0] != 1 and mask.shape[1] == 1)
    return isinstance(mask, (list, tuple))


def _is_one_polygon(polygons: Any) -> bool:
    return not isinstance(polygons, list) or any(is_numbers(point) for point in polygons)


def _is_values(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 1)
