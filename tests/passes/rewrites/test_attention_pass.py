"""Attention among sites, from sites to text, and the forms that stay dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.pass_tools import (
    Forward,
    TextForward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    program_of,
    reasons,
)

SDPA = "aten.scaled_dot_product_attention"
CROSS = "fisedit.cross_attention"


def layers() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(8, 8, 3, padding=1)} | {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}


def heads(tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (2, 4)).transpose(1, 2)


def attend(x: Tensor, module: Any, text: Tensor | None = None, **options: Any) -> Tensor:
    """``[B, C, H, W]`` through one attention over its sites, with the residual."""
    tokens = module.conv(x).flatten(2).transpose(1, 2)
    context = tokens if text is None else text
    query, key, value = heads(module.q(tokens)), heads(module.k(context)), heads(module.v(context))
    mixed = F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2)
    return x + module.out(mixed).transpose(1, 2).reshape(x.shape)


def self_attention(**options: Any) -> Forward:
    return Forward(lambda m, x: attend(x, m, **options), **layers())


def cross_attention(options: Callable[[Tensor], dict[str, Any]] = lambda text: {}) -> TextForward:
    return TextForward(lambda m, x, text: attend(x, m, text, **options(text)), **layers())


@pytest.mark.parametrize("scale", [None, 0.3])
def test_cached_self_attention(scale: float | None) -> None:
    compiled = compile_small(self_attention(scale=scale))
    program = program_of(compiled)
    after = counts(program.step)
    assert program.operations[SDPA] == 1 and after[SDPA] == 0 and after["fisedit.attention_sites"] == 1
    assert {"key", "value"} <= {slot.name for slot in program.slots}
    assert not program.refusals
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_active_self_attention_records_no_keys_and_values(scale: float | None) -> None:
    compiled = compile_small(self_attention(scale=scale), attention="active")
    program = program_of(compiled)
    after = counts(program.step)
    assert after["fisedit.attention_rows"] == 1 and after[SDPA] == after["fisedit.attention_sites"] == 0
    assert not {"key", "value"} & {slot.name for slot in program.slots}
    assert_equals_oracle(compiled)


@pytest.mark.parametrize("attention", ["cached", "active"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_cross_attention_hoists_the_text(attention: str, scale: float | None) -> None:
    compiled = compile_small(cross_attention(lambda text: {"scale": scale}), attention=attention)
    program = program_of(compiled)
    after = counts(program.step)
    assert after[CROSS] == 1 and after[SDPA] == after["fisedit.attention_sites"] == 0
    assert after["aten.linear"] == 2, "queries and output remain, keys and values are the text's business"
    (text,) = (bundle for bundle in program.bundles if bundle.dependences == {"text"})
    assert counts(text.graph)["aten.linear"] == 2
    assert not {"key", "value"} & {slot.name for slot in program.slots}
    assert not program.refusals
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_a_text_mask_is_hoisted_too() -> None:
    def mask_of(text: Tensor) -> dict[str, Any]:
        return {"attn_mask": (text.mean(-1) > -1.0)[:, None, None, :]}

    compiled = compile_small(cross_attention(mask_of))
    program = program_of(compiled)
    after = counts(program.step)
    assert after[SDPA] == 1 and after[CROSS] == 0
    assert not program.refusals
    assert_equals_oracle(compiled)


def test_texts_in_other_forms_keep_torchs_attention() -> None:
    """Heads that share keys, a text that all samples share, no heads at all: sparse, but not the op's four axes."""

    def grouped(query: Tensor, context: Tensor) -> Tensor:
        shared = context[..., :4].unsqueeze(1)
        mixed = F.scaled_dot_product_attention(heads(query), shared, shared, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)

    def one_for_all(query: Tensor, context: Tensor) -> Tensor:
        shared = heads(context)[:1]
        return F.scaled_dot_product_attention(heads(query), shared, shared).transpose(1, 2).flatten(2)

    for mix in (grouped, one_for_all, lambda query, context: F.scaled_dot_product_attention(query, context, context)):

        def forward(module: Any, x: Tensor, text: Tensor, mix: Callable[..., Tensor] = mix) -> Tensor:
            query = module.q(module.conv(x).flatten(2).transpose(1, 2))
            return x + module.out(mix(query, module.k(text))).transpose(1, 2).reshape(x.shape)

        compiled = compile_small(TextForward(forward, **layers()))
        program = program_of(compiled)
        after = counts(program.step)
        assert after[SDPA] == 1 and after[CROSS] == 0 and not program.refusals
        assert_equals_oracle(compiled)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"is_causal": True}, "causal"), ({"dropout_p": 0.0, "is_causal": True}, "causal")],
    ids=["causal", "causal by position"],
)
def test_causal_attention_stays_dense_with_a_reason(options: dict[str, Any], word: str) -> None:
    compiled = compile_small(self_attention(**options))
    program = program_of(compiled)
    assert counts(program.step)[SDPA] == 1
    assert word in reasons(program)[SDPA]
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_a_bias_between_sites_stays_dense_with_a_reason() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2] * x.shape[3], device=x.device, dtype=x.dtype)
        return attend(x, module, attn_mask=-(positions[:, None] - positions[None, :]).abs() * 0.1)

    compiled = compile_small(Forward(forward, **layers()))
    program = program_of(compiled)
    assert counts(program.step)[SDPA] == 1 and "mask between sites" in reasons(program)[SDPA]
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_attention_written_out_stays_dense_with_a_reason() -> None:
    """``softmax(q @ k) @ v``: its matrix relates sites to sites."""

    def forward(module: Any, x: Tensor) -> Tensor:
        tokens = module.conv(x).flatten(2).transpose(1, 2)
        weights = torch.softmax(module.q(tokens) @ module.k(tokens).transpose(1, 2), -1)
        return x + (weights @ module.v(tokens)).transpose(1, 2).reshape(x.shape)

    compiled = compile_small(Forward(forward, **layers()))
    program = program_of(compiled)
    assert "attention matrix" in reasons(program)["aten.softmax.int"]
    assert_full_mask_is_dense(compiled)
    assert_equals_oracle(compiled, {"linear"})


def test_joint_attention_stays_dense_with_a_reason() -> None:
    """Text and image tokens side by side, as in diffusion transformers."""

    def forward(module: Any, x: Tensor, text: Tensor) -> Tensor:
        tokens = torch.cat([text, module.conv(x).flatten(2).transpose(1, 2)], 1)
        mixed = F.scaled_dot_product_attention(
            heads(module.q(tokens)), heads(module.k(tokens)), heads(module.v(tokens))
        )
        return x + mixed.transpose(1, 2).flatten(2)[:, text.shape[1] :].transpose(1, 2).reshape(x.shape)

    compiled = compile_small(TextForward(forward, **layers()))
    program = program_of(compiled)
    assert "other tokens beside sites" in reasons(program)[SDPA]
    assert_full_mask_is_dense(compiled)
