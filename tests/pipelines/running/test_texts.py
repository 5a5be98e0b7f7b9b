"""Equal texts are encoded once, bit for bit as the encoder does, and again as soon as the encoder is another one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fisedit_compiler.pipelines import Editor
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.steps import KeepLatents
from fisedit_compiler.pipelines.running.texts import KEPT, Texts
from tests.support.tiny_pipeline import make_tiny_pipeline


@pytest.fixture
def pipe() -> Any:
    return make_tiny_pipeline()


def encode(pipe: Any, prompt: str = "a cat", negative: str = "a dog", **options: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = pipe.encode_prompt(prompt, "cpu", 1, True, negative, **options)
    return found


@contextmanager
def counted(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """What the encoder's own forward is called with."""
    calls: list[torch.Tensor] = []
    forward = type(pipe.text_encoder).forward

    def counting(encoder: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(input_ids)
        return forward(encoder, input_ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(pipe.text_encoder), "forward", counting)
        yield calls


def computed(texts: Texts) -> int:
    """Calls that the encoder computed. What counts them inside of it would be a change of it."""
    return texts._known["text_encoder"].computed


def test_an_edit_asks_for_its_own_text_only(pinned_editor: Editor, generate: Callable[..., Any]) -> None:
    texts, mask = pinned_editor._texts, torch.ones(16, 16, dtype=torch.bool)
    base = generate("a cat", negative_prompt="bad")
    assert computed(texts) == 2
    edit = pinned_editor.edit(base, "a dog", mask=mask)
    assert computed(texts) == 3
    pinned_editor.edit(base, "a dog", mask=mask)
    pinned_editor.edit(base, "a dog", mask=mask, negative_prompt="a cat")
    generate("bad", negative_prompt="a dog")
    assert computed(texts) == 3
    fresh = Driver(pinned_editor.pipe, False)
    latents = KeepLatents()
    fresh.run("a dog", "bad", base.settings, latents, "dense")
    assert torch.equal(edit.latents[0], latents.latents[0])
    assert "forward" not in vars(pinned_editor.pipe.text_encoder)


def test_embeddings_are_the_encoders_own(pipe: Any) -> None:
    expected, texts = encode(pipe), Texts()
    for _ in range(3):
        with texts.encoded_once(pipe):
            assert all(map(torch.equal, encode(pipe), expected))
    assert computed(texts) == 2


def test_other_arguments_and_another_state_are_other_calls(pipe: Any) -> None:
    texts = Texts()
    ids = pipe.tokenizer("a cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
    for expected in (4, 8, 8):  # asked for hidden states, transformers puts hooks on the encoder, once
        with texts.encoded_once(pipe), torch.no_grad():
            plain = pipe.text_encoder(ids)
            assert pipe.text_encoder(ids, output_hidden_states=True).hidden_states is not None
            assert plain.hidden_states is None
            pipe.text_encoder(ids, attention_mask=torch.ones_like(ids))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert not torch.equal(pipe.text_encoder(ids)[0].float(), plain[0])
        assert computed(texts) == expected


def test_texts_whose_hidden_states_are_wanted_are_encoded_once_too(pipe: Any) -> None:
    """Other than the user's own, the hooks that transformers puts on the encoder do nothing but collect them."""
    texts = Texts()
    ids = pipe.tokenizer("a cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
    for expected in (1, 2, 2):
        with texts.encoded_once(pipe), torch.no_grad():
            found = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        assert any(part._forward_hooks for part in pipe.text_encoder.modules()) and computed(texts) == expected
        with torch.no_grad():
            assert all(map(torch.equal, found, pipe.text_encoder(ids, output_hidden_states=True).hidden_states))


def test_switches_that_change_the_last_bits_are_part_of_the_question(pipe: Any) -> None:
    texts, matmul = Texts(), torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for expected in (1, 2):
            with texts.encoded_once(pipe):
                encode(pipe, "a cat", "a cat")
            assert computed(texts) == expected
            matmul.allow_tf32 = not before
    finally:
        matmul.allow_tf32 = before


def test_who_writes_to_embeddings_writes_to_copies(pipe: Any) -> None:
    expected, texts = encode(pipe), Texts()
    ids = pipe.tokenizer("a cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
    for _ in range(3):
        with texts.encoded_once(pipe), torch.no_grad():
            pipe.text_encoder(ids)[0].zero_()
            assert torch.equal(encode(pipe)[0], expected[0])


def add_to_weight(pipe: Any) -> None:
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).add_(1.0)


def write_past_torch(pipe: Any) -> None:
    next(pipe.text_encoder.parameters()).data.numpy()[:] += 1.0


def exchange_weight(pipe: Any) -> None:
    norm = pipe.text_encoder.text_model.final_layer_norm if hasattr(pipe.text_encoder, "text_model") else None
    norm = norm if norm is not None else pipe.text_encoder.final_layer_norm
    norm.weight = torch.nn.Parameter(norm.weight * 2.0)


def exchange_encoder(pipe: Any) -> None:
    other = make_tiny_pipeline().text_encoder
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    pipe.text_encoder = other


def exchange_activation(pipe: Any) -> None:
    for part in pipe.text_encoder.modules():
        if hasattr(part, "activation_fn"):
            part.activation_fn = torch.nn.ReLU()


def exchange_tokenizer(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["a cat"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))


@pytest.mark.parametrize(
    "change",
    [add_to_weight, write_past_torch, exchange_weight, exchange_encoder, exchange_activation, exchange_tokenizer],
)
def test_another_encoder_or_tokenizer_is_asked_again(pipe: Any, change: Callable[[Any], None]) -> None:
    texts = Texts()
    with texts.encoded_once(pipe):
        before = encode(pipe)
    change(pipe)
    with texts.encoded_once(pipe):
        found = encode(pipe)
    assert all(map(torch.equal, found, encode(pipe)))
    assert not torch.equal(found[0], before[0])


def test_a_scale_of_adapters_is_followed_within_a_run(pipe: Any) -> None:
    class Scaled(torch.nn.Module):
        """As PEFT's layers keep it, and diffusers writes it for one call."""

        def __init__(self) -> None:
            super().__init__()
            self.scaling = {"default": 1.0}

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(hidden) * self.scaling["default"]

    scaled = Scaled()
    for part in pipe.text_encoder.modules():
        if hasattr(part, "activation_fn"):
            part.activation_fn = scaled
    with Texts().encoded_once(pipe):
        before = encode(pipe)
        scaled.scaling["default"] = 3.0
        after = encode(pipe)
    assert not torch.equal(after[0], before[0])
    assert all(map(torch.equal, after, encode(pipe)))


def hook(pipe: Any) -> None:
    pipe.text_encoder.register_forward_hook(lambda *_: None)


def hook_inside(pipe: Any) -> None:
    list(pipe.text_encoder.modules())[-1].register_forward_pre_hook(lambda *_: None)


def train(pipe: Any) -> None:
    pipe.text_encoder.train()


def of_another_class(pipe: Any) -> None:
    class Own(type(pipe.text_encoder)):  # type: ignore[misc]
        """May do anything."""

    pipe.text_encoder.__class__ = Own


@pytest.mark.parametrize("change", [hook, hook_inside, train, of_another_class])
def test_an_encoder_that_does_more_than_it_returns_is_always_asked(pipe: Any, change: Callable[[Any], None]) -> None:
    change(pipe)
    texts = Texts()
    with counted(pipe) as calls:
        for _ in range(3):
            with texts.encoded_once(pipe):
                encode(pipe)
    assert len(calls) == 6


def test_calls_of_others_are_the_encoders_own(pipe: Any) -> None:
    texts, elsewhere = Texts(), []
    with counted(pipe) as calls, texts.encoded_once(pipe):
        encode(pipe)
        assert len(calls) == 2
        thread = threading.Thread(target=lambda: elsewhere.append(encode(pipe)))
        thread.start()
        thread.join()
        assert len(calls) == 4 and len(elsewhere) == 1
        with Texts().encoded_once(pipe):  # of another Editor that shares the encoder
            encode(pipe)
        assert len(calls) == 6
        encode(pipe)
        assert len(calls) == 6
        ids = pipe.tokenizer("a cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
        assert pipe.text_encoder(ids)[0].requires_grad  # somebody trains with it
        assert len(calls) == 7


def test_an_encoders_own_forward_is_put_back(pipe: Any) -> None:
    own = pipe.text_encoder.forward
    pipe.text_encoder.forward = own
    with pytest.raises(RuntimeError, match="stopped"), Texts().encoded_once(pipe):
        assert pipe.text_encoder.forward is not own
        raise RuntimeError("stopped")
    assert vars(pipe.text_encoder)["forward"] is own


def test_few_texts_are_kept(pipe: Any) -> None:
    texts = Texts()
    for number in range(2 * KEPT):
        with texts.encoded_once(pipe):
            encode(pipe, "a " * (number % 20) + f"cat {number}", "a cat")
    assert len(texts._known["text_encoder"]._kept) == KEPT
    with texts.encoded_once(pipe):
        before = computed(texts)
        encode(pipe, "cat 0", "a cat")
        assert computed(texts) == before + 1  # the negative prompt is the last used of all


def test_a_pipeline_without_an_encoder_is_none_of_it() -> None:
    class Without:
        text_encoder = None

    with Texts().encoded_once(Without()):
        pass
