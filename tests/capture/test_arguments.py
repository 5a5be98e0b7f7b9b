"""From arguments to names: whose signature counts when somebody exchanges what it is made of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fisedit_compiler.capture.arguments import bind, sign

SAMPLE = torch.zeros(1)


class Wrapped(nn.Module):
    """A forward with a decorator; both functions are of this class alone."""

    def __init__(self) -> None:
        super().__init__()

        def inner(module: Any, sample: Any, scale: Any = None, *, extra: Any = None) -> Any:
            return sample

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        self.inner, self.outer = inner, forward
        self.forward = forward.__get__(self)


def other(module: Any, sample: Any, gain: Any = None, *, extra: Any = None) -> Any:
    return sample


@pytest.mark.parametrize("change", [
    lambda module: setattr(module.inner, "__defaults__", (2.0,)),
    lambda module: setattr(module.inner, "__kwdefaults__", {"extra": 2.0}),
    lambda module: module.inner.__kwdefaults__.update(extra=2.0),
    lambda module: setattr(module.inner, "__code__", other.__code__),
    lambda module: setattr(module.outer, "__wrapped__", other),
    lambda module: delattr(module.outer, "__wrapped__"),
    lambda module: setattr(module.outer, "__signature__", inspect.signature(other)),
], ids=["default", "default of a name", "in place", "code", "wrapped", "unwrapped", "signature"])  # fmt: skip
def test_what_a_signature_is_made_of_may_be_exchanged(change: Callable[[Wrapped], None]) -> None:
    module = Wrapped()
    given: dict[str, Any] = {"scale": None, "extra": None}
    assert bind(module, (SAMPLE,), given, {}) == {"sample": SAMPLE}
    change(module)
    asked = inspect.signature(module.forward)
    try:
        bound = asked.bind(SAMPLE, **given)
    except TypeError:
        with pytest.raises(TypeError):
            bind(module, (SAMPLE,), given, {})
        return
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in asked.parameters.values()):
        with pytest.raises(Exception, match="takes \\*args"):
            bind(module, (SAMPLE,), given, {})
        return
    left = {name for name, value in bound.arguments.items() if value is not asked.parameters[name].default}
    assert bind(module, (SAMPLE,), given, {}).keys() == left


def test_the_signature_of_a_forward_that_stays_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Wrapped()
    bind(module, (SAMPLE,), {}, {})
    monkeypatch.setattr(inspect, "signature", lambda function: pytest.fail("made again"))
    assert bind(module, (SAMPLE,), {}, {}) == {"sample": SAMPLE}


def test_a_batch_of_one_signs_as_a_larger_one() -> None:
    """Guidance that is embedded or off makes one; several edits in one run repeat it."""

    def call(batch: int) -> dict[str, Any]:
        return {
            "sample": torch.zeros(batch, 4, 8, 8),
            "encoder_hidden_states": torch.zeros(batch, 5, 16),
            "encoder_attention_mask": torch.ones(batch, 5),
            "timestep_cond": torch.zeros(batch, 256),
            "class_labels": torch.zeros(batch),
            "added_cond_kwargs": {
                "text_embeds": torch.zeros(batch, 16),
                "time_ids": torch.zeros(batch, 6),
                "image_embeds": [torch.zeros(batch, 1, 16)],
            },
        }

    one, three = (sign(call(batch), ("sample",))[0] for batch in (1, 3))
    assert one == three


def test_one_weight_of_guidance_for_a_whole_batch_has_no_batch_axis() -> None:
    shared = {"sample": torch.zeros(2, 4, 8, 8), "timestep_cond": torch.zeros(1, 256)}
    (spec,) = (spec for spec in sign(shared, ("sample",))[0].tensors if spec.name == "timestep_cond")
    assert spec.axes == (1, 256)
