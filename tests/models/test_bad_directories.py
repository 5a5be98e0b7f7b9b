"""Model directories that are damaged, incomplete or hostile: one named error of one line, and nothing in them runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fisedit_compiler.errors import ModelNotFoundError
from fisedit_compiler.models import embedded_model_path, load_clip, load_pipeline


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A copy of the embedded pipeline to damage."""
    return Path(shutil.copytree(embedded_model_path("emoji-scenes"), tmp_path / "model"))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A copy of the embedded CLIP to damage."""
    return Path(shutil.copytree(embedded_model_path("emoji-clip"), tmp_path / "clip"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> str:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[3]
    change(weights, name)
    save_file(weights, file, metadata={"format": "pt"})
    return name.removeprefix("text_model.")


def assert_refused(load: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class Marker:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickle_weights(folder: Path, name: str, ran: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    torch.save({**load_file(file), "marker": Marker(ran)}, folder / name)
    file.unlink()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_never_read(part: str, pipeline: Path, tmp_path: Path) -> None:
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    pickle_weights(pipeline / part, name, tmp_path / "ran")
    assert_refused(lambda: load_pipeline(pipeline), f"{part}/{name}", "pickled", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_clip_are_never_read(clip: Path, tmp_path: Path) -> None:
    pickle_weights(clip, "pytorch_model.bin", tmp_path / "ran")
    assert_refused(lambda: load_clip(model=clip), "pytorch_model.bin", "pickled")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_weight_is_named(part: str, pipeline: Path) -> None:
    """diffusers would leave it without memory, transformers would draw it."""
    name = change_weights(pipeline / part, lambda weights, name: weights.__delitem__(name))
    assert_refused(lambda: load_pipeline(pipeline), f"{pipeline / part}", "incomplete", name)


def test_a_missing_weight_of_a_clip_is_named(clip: Path) -> None:
    change_weights(clip, lambda weights, name: weights.__delitem__(name))
    assert_refused(lambda: load_clip(model=clip), "incomplete")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_weight_of_another_shape_is_refused(part: str, pipeline: Path) -> None:
    change_weights(pipeline / part, lambda weights, name: weights.update({name: weights[name][:1].clone()}))
    assert_refused(lambda: load_pipeline(pipeline), "could not be loaded")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_truncated_file_is_refused(part: str, pipeline: Path) -> None:
    (file,) = (pipeline / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert_refused(lambda: load_pipeline(pipeline), "could not be loaded")


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", "null", '"x"', "[" * 100_000, '{"_class_name": 3}', "\x00"])
def test_what_is_no_index_is_refused(text: str, pipeline: Path) -> None:
    (pipeline / "model_index.json").write_text(text)
    assert_refused(lambda: load_pipeline(pipeline), "model_index.json is no index")


@pytest.mark.parametrize(
    ("value", "words"), [(["os", "system"], "of 'os'"), (["diffusers"], "a library and a class"), ([1, 2], "a library")]
)
def test_an_index_imports_nothing_else(value: Any, words: str, pipeline: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"unet": value}))
    assert_refused(lambda: load_pipeline(pipeline), "unet", words)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "vae/config.json"]
)
@pytest.mark.parametrize("text", ["[]", ""])
def test_a_damaged_config_is_refused(file: str, text: str, pipeline: Path) -> None:
    (pipeline / file).write_text(text)
    assert_refused(lambda: load_pipeline(pipeline), "could not be loaded")
