"""``Editor.prepare()``: where calls are lowered the first edit finds everything made; elsewhere nothing runs ahead."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fisedit_compiler import Editor, SparsifyConfig
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.runtime.execution.cuda_graphs import GraphPool
from tests.support.graph_stand_in import fake_compile, patch_cuda, patch_encoder_graphs
from tests.support.tiny_pipeline import make_tiny_pipeline

MASK = torch.zeros(16, 16, dtype=torch.bool)
MASK[2:7, 3:9] = True


@pytest.fixture
def pipe() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is compiled and captured, in order, as a GPU would."""
    known: list[str] = []

    def compile(*args: Any, **kwargs: Any) -> Any:
        known.append("dense" if kwargs.get("dynamic") is False else "compiled")
        return fake_compile(*args, **kwargs)

    capture = GraphPool._capture

    def captured(*args: Any) -> Any:
        known.append("captured")
        return capture(*args)

    patch_cuda(monkeypatch, compile)
    monkeypatch.setattr(GraphPool, "_capture", captured)
    monkeypatch.setattr(SparsifyConfig, "backend_on", lambda config, kind: "inductor")
    yield known


@pytest.mark.parametrize(("parts", "count"), [(("unet",), 1), (("unet", "vae.decoder"), 2)])
def test_the_first_edit_finds_everything_made(made: list[str], pipe: Any, parts: Sequence[str], count: int) -> None:
    with Editor(pipe, SparsifyConfig(norm="incremental", dense_above=1.0), parts=parts) as editor:
        assert editor.prepare() is editor
        assert made[:2] == ["captured", "compiled"]
        assert made.count("compiled") == count, "one compilation a part, for an edit that is recorded"
        assert made.count("dense") == 1, "and one for the UNet's runs that are recorded"
        base = editor.generate("a cat", seed=3, num_inference_steps=3)
        edit = editor.edit(base, "a dog", mask=MASK)
        assert edit.report.sparse_calls == 3 and edit.unchanged_outside
        assert (made.count("compiled"), made.count("dense")) == (count, 1)


def test_texts_are_encoded_by_a_graph_from_the_first_run_on(
    made: list[str], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_encoder_graphs(monkeypatch)
    with Editor(pipe, SparsifyConfig(norm="incremental", dense_above=1.0)) as editor:
        editor.prepare()
        graphs = editor._texts._known["text_encoder"]._graphs
        (graph,) = graphs._graphs()
        base = editor.generate("a cat", seed=3, num_inference_steps=3)
        editor.edit(base, "a dog", mask=MASK)
        assert graphs._graphs() == [graph] and graphs.refused is None


def test_a_run_ahead_changes_no_later_one(made: list[str], pipe: Any) -> None:
    with Editor(pipe) as editor:
        expected = editor.generate("a cat", seed=3, num_inference_steps=3)
        state = torch.get_rng_state()
        editor.prepare()
        assert torch.equal(torch.get_rng_state(), state)
        # Dense calls are compiled from then on: the same up to rounding.
        again = editor.generate("a cat", seed=3, num_inference_steps=3)
        torch.testing.assert_close(again.latents[-1], expected.latents[-1], rtol=1e-3, atol=1e-3)


def test_sizes_and_guidance_are_those_of_the_runs_to_come(
    made: list[str], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    with Editor(pipe) as editor:
        editor.compiled.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        editor.prepare(height=48, width=32, guidance_scale=1.0)
    height, width = 48 // pipe.vae_scale_factor, 32 // pipe.vae_scale_factor
    assert set(seen) == {torch.Size((1, pipe.unet.config.in_channels, height, width))}


def test_a_pipeline_that_wants_more_is_left_to_its_first_use(
    made: list[str], pipe: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_inputs(*args: Any, **kwargs: Any) -> None:
        raise TypeError("image must be passed")

    monkeypatch.setattr(pipe, "check_inputs", check_inputs)
    with Editor(pipe) as editor, caplog.at_level(logging.WARNING):
        editor.prepare()
        assert pipe.unet is editor.compiled
    (warning,) = [record.getMessage() for record in caplog.records if "ahead" in record.getMessage()]
    assert "image must be passed" in warning and "options=" in warning


def test_on_a_cpu_nothing_runs_ahead(pipe: Any) -> None:
    calls: list[Any] = []
    with Editor(pipe) as editor:
        editor.compiled.register_forward_pre_hook(lambda *args: calls.append(args))
        editor.prepare()
        assert not calls and pipe.unet is editor.compiled


@pytest.mark.parametrize(
    ("name", "value"),
    [("height", 33), ("width", 33), ("height", -8), ("height", "a"), ("guidance_scale", "x"), ("options", {"no": 1})],
)
def test_settings_that_no_run_could_have_are_refused_everywhere(pipe: Any, name: str, value: Any) -> None:
    with Editor(pipe) as editor, pytest.raises(ConfigError):
        editor.prepare(**{name: value})
