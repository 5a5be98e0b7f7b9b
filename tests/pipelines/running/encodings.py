"""Tiny text encoders, and runs of a pipeline that has one and nothing else. No test lives here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fisedit_compiler.pipelines.running.encoder_graphs import EncoderGraphs
from fisedit_compiler.pipelines.running.texts import Texts
from fisedit_compiler.tensors.contents import is_equal

LENGTH = 12
"""Tokens."""


def make(kind: type[nn.Module], device: str) -> nn.Module:
    """A tiny encoder; half precision where an encoder usually has it."""
    if kind is T5EncoderModel:
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    else:
        config = CLIPTextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=LENGTH, projection_dim=16, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        )  # fmt: skip
    return kind(config).eval().to(device, torch.float16 if device == "cuda" else torch.float32)


class Encoding:
    """A pipeline that has an encoder and nothing else, and what runs of it gave."""

    def __init__(self, device: str, kind: type[nn.Module] = CLIPTextModel, encoder: nn.Module | None = None) -> None:
        self.encoder = make(kind, device) if encoder is None else encoder
        self.texts, self.device, self.texts_made = Texts(), device, 0

    @property
    def graphs(self) -> EncoderGraphs:
        return self.texts._known["text_encoder"]._graphs

    def new_text(self, batch: int = 1) -> Tensor:
        self.texts_made += 1
        generator = torch.Generator().manual_seed(self.texts_made)
        return torch.randint(3, 60, (batch, LENGTH), generator=generator).to(self.device)

    def run(
        self, count: int = 1, batch: int = 1, change: Callable[[], None] = lambda: None, **options: Any
    ) -> list[tuple[Any, Any]]:
        """What a run with new texts gave, and the encoder itself; ``change`` is made before each text."""
        pipe, found = SimpleNamespace(text_encoder=self.encoder), []
        texts = [self.new_text(batch) for _ in range(count)]
        expected = []
        with self.texts.encoded_once(pipe), torch.no_grad():
            for text in texts:
                change()
                found.append(pipe.text_encoder(text, **options))
                # Of the class, as nobody else would call it within the run.
                expected.append(type(self.encoder).forward(self.encoder, text, **options))
        return list(zip(found, expected, strict=True))

    def check(self, *args: Any, **options: Any) -> None:
        for found, expected in self.run(*args, **options):
            assert_same(found, expected)


def assert_same(found: Any, expected: Any) -> None:
    (given, structure), (right, other) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert structure == other and type(found) is type(expected)
    assert any(isinstance(value, Tensor) for value in right)
    for value, leaf in zip(given, right, strict=True):
        assert is_equal(value, leaf) if isinstance(leaf, Tensor) else value == leaf


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if "without CUDA graphs" in entry.getMessage()]
