"""A graph reads weights where they were: when it is made anew, and what is followed without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler.pipelines.running.encoder_graphs import EncoderGraphs
from tests.pipelines.running.encodings import Encoding, assert_same


def write_in_place(encoder: nn.Module) -> None:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)


def write_past_torch(encoder: nn.Module) -> None:
    for parameter in encoder.parameters():
        parameter.data.mul_(1.5)


def exchange_memory(encoder: nn.Module) -> None:
    for parameter in encoder.parameters():
        before = parameter.data
        parameter.data = before * 1.5
        before.zero_()


def exchange_for_equal_ones(encoder: nn.Module) -> None:
    for part in encoder.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().clone()))
            parameter.data.zero_()


def exchange_activation(encoder: nn.Module) -> None:
    for part in encoder.modules():
        if hasattr(part, "activation_fn"):
            part.activation_fn = nn.ReLU()


def other_dtype(encoder: nn.Module) -> None:
    encoder.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [write_in_place, write_past_torch, exchange_memory, exchange_for_equal_ones, exchange_activation, other_dtype],
)
def test_another_encoder_is_followed(change: Callable[[nn.Module], None], device: str, replays: list[None]) -> None:
    encoding = Encoding(device)
    encoding.check(3)
    change(encoding.encoder)
    encoding.check(3)
    change(encoding.encoder)
    encoding.check(6)
    assert len(replays) > 2 and encoding.graphs.refused is None


def test_weights_that_move_in_the_middle_of_a_run_are_followed(device: str, replays: list[None]) -> None:
    encoding = Encoding(device)
    encoding.check(3)
    encoding.check(2, change=lambda: exchange_memory(encoding.encoder))
    assert len(replays) == 2
    encoding.check(3)


def test_weights_that_are_exchanged_all_the_time_are_waited_for_less_and_less(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[None] = []
    capture = EncoderGraphs._capture

    def counted(*args: Any) -> Any:
        made.append(None)
        return capture(*args)

    monkeypatch.setattr(EncoderGraphs, "_capture", counted)
    encoding = Encoding(device)
    for _ in range(5):
        encoding.check(2)
        write_in_place(encoding.encoder)
    assert len(made) == 1


class Scaled(nn.Module):
    """As PEFT's layers keep their scales, and diffusers writes them for one call."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling = {"default": 1.0}

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.gelu(hidden) * self.scaling["default"]


def test_scales_of_adapters_are_followed_within_a_run(device: str, replays: list[None]) -> None:
    encoding, scaled = Encoding(device), Scaled()
    for part in encoding.encoder.modules():
        if hasattr(part, "activation_fn"):
            part.activation_fn = scaled

    def other_scale() -> None:
        scaled.scaling["default"] = 3.0 if scaled.scaling["default"] == 1.0 else 1.0

    encoding.check(8, change=other_scale)
    assert len(replays) == 6 and len(encoding.graphs._graphs()) == 2


def test_a_lora_that_is_loaded_and_scaled_is_followed(device: str, replays: list[None]) -> None:
    peft = pytest.importorskip("peft")
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    encoding = Encoding(device)
    encoding.check(3)
    encoding.encoder.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    encoding.encoder.eval()
    ((found, expected),) = encoding.run()
    assert_same(found, expected)
    encoding.check(4)
    known = len(replays)
    scale_lora_layers(encoding.encoder, 0.25)
    encoding.check(8)
    unscale_lora_layers(encoding.encoder, 0.25)
    encoding.check(2)
    assert len(replays) > known and encoding.graphs.refused is None
    encoding.encoder.disable_adapters()
    encoding.check(8)
