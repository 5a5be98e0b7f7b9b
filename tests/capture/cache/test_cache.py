"""Captures on disk: a second load is the same program, and nothing bad on disk can hurt."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.capture import cache
from fisedit_compiler.capture.cache import store
from fisedit_compiler.capture.keys import structure_key
from fisedit_compiler.graph import ir
from tests.support.compiled_zoo import base_inputs, edit_inputs, make_mask, output_of, zoo_model

SIZE = (8, 24)
# Constants, dense islands and a norm, yet captured in a second.
SMALL = "pooled"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test here."""
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.is_dir() else []


def compiled(name: str = SMALL, module: nn.Module | None = None, **options: Any) -> SparseModule:
    model = zoo_model(name)
    config = SparsifyConfig(multiple=model.multiple, **options)
    return sparsify(module or model.module, config, example_inputs=base_inputs(name, 2, SIZE))


def described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [
        (node.op, node.name, ir.target_name(node.target), str(node.args), str(node.kwargs), str(node.meta.get("spec")))
        for node in graph.nodes
    ]


def one_edit(module: SparseModule, name: str) -> torch.Tensor:
    mask = make_mask("block", SIZE)
    with module.record() as recording:
        module(**base_inputs(name, 2, SIZE))
    with module.edit(recording, mask):
        return output_of(module(**edit_inputs(name, 2, SIZE, mask)))


@pytest.mark.parametrize("name", [SMALL, "sdxl", "vae_decoder"])
def test_a_second_load_is_the_same_program(name: str, folder: Path) -> None:
    first = compiled(name)
    second = compiled(name, copy.deepcopy(zoo_model(name).module))
    (cold,), (warm,) = first.programs, second.programs
    assert len(entries(folder)) == 1
    assert not cold.from_cache and warm.from_cache
    for graph in ("recording", "step", "update"):
        assert described(getattr(cold, graph)) == described(getattr(warm, graph))
    assert cold.slots == warm.slots and cold.convs == warm.convs and cold.refusals == warm.refusals
    assert cold.constants.keys() == warm.constants.keys()
    assert all(torch.equal(tensor, warm.constants[key]) for key, tensor in cold.constants.items())
    assert torch.equal(one_edit(first, name), one_edit(second, name))


def test_one_capture_serves_every_configuration(folder: Path) -> None:
    compiled()
    for options in ({"norm": "incremental"}, {"attention": "active"}, {"disabled_passes": {"convolution"}}):
        assert compiled(**options).programs[0].from_cache
    assert len(entries(folder)) == 1


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from tests.support.compiled_zoo import zoo_model
from fisedit_compiler.capture.keys import structure_key
print(structure_key(zoo_model("sdxl").module))
"""


def test_another_process_computes_the_same_key() -> None:
    """Neither hash seeds nor addresses may enter the key."""
    script = SCRIPT.format(paths=[str(Path(__file__).parents[3])])
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == structure_key(zoo_model("sdxl").module)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "no graph", "another graph"])
def test_a_damaged_entry_is_ignored_and_replaced(damage: str, folder: Path) -> None:
    expected = one_edit(compiled(), SMALL)
    (entry,) = entries(folder)
    content = entry.read_bytes()
    replacement = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "garbage": b"\x00\xff" * 400,
        "no graph": content.replace(b'"graph"', b'"grape"'),
        "another graph": content.replace(b"conv2d", b"conv9d"),
    }[damage]
    assert replacement != content
    entry.write_bytes(replacement)
    again = compiled()
    assert not again.programs[0].from_cache
    assert torch.equal(one_edit(again, SMALL), expected)
    assert compiled().programs[0].from_cache, "the entry was written again"


def test_an_entry_holds_no_code_and_no_weights(folder: Path) -> None:
    module = compiled("vae_decoder")
    (entry,) = entries(folder)
    content = store.read(entry)
    assert content is not None
    assert set(safetensors.torch.load(content)) == set(module.programs[0].constants)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header["__metadata__"]) == {"graph"}
    assert entry.stat().st_size < sum(p.nbytes for p in module.original.parameters())


def test_cache_off_writes_and_reads_nothing(folder: Path) -> None:
    compiled(cache=False)
    assert entries(folder) == []
    compiled()
    assert not compiled(cache=False).programs[0].from_cache


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "file"))
    assert not compiled().programs[0].from_cache


def test_old_entries_are_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_ENTRIES", 2)
    folder.mkdir(parents=True)
    foreign = folder / "notes.safetensors"
    for index, name in enumerate(
        ["0" * 64 + ".safetensors", "1" * 64 + ".capture", "2" * 64 + ".capture", foreign.name]
    ):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (index, index))
    compiled()
    assert len(entries(folder)) == 3 and foreign.exists(), "only entries are deleted"
    assert compiled().programs[0].from_cache, "the newest one stayed"


class Layers(nn.Module):
    """What a structure key must see."""

    def __init__(self, channels: int = 4, scale: float = 1.0, activation: Any = torch.relu) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, 3, padding=1)
        self.scale, self.activation = scale, activation

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.activation(self.conv(sample)) * self.scale


class Doubled(Layers):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return super().forward(sample) * 2


def test_the_key_changes_with_the_structure_and_not_with_weights() -> None:
    def activation(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def another(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    another.__qualname__ = activation.__qualname__
    variants = [
        Layers(),
        Layers(channels=8),
        Layers(scale=0.5),
        Layers(activation=torch.sigmoid),
        Layers(activation=activation),
        Layers(activation=another),
        Doubled(),
        Layers().double(),
    ]
    keys = [structure_key(module) for module in variants]
    assert len(set(keys)) == len(variants)
    assert structure_key(Layers()) == keys[0], "two initialisations are one structure"


def test_the_key_changes_with_the_code_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module edited between two runs of a notebook is another module."""
    before = structure_key(Layers())
    monkeypatch.setattr(Layers, "forward", lambda self, sample: self.conv(sample))
    assert structure_key(Layers()) != before


def test_the_key_changes_with_the_call_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = compiled(cache=False).programs
    wider = replace(program.signature, constants=(("flag", "True"),))
    paths = {
        cache.entry_path("structure", program.signature, 2),
        cache.entry_path("structure", program.signature, None),
        cache.entry_path("another", program.signature, 2),
        cache.entry_path("structure", wider, 2),
    }
    monkeypatch.setattr(cache, "_version", lambda package: "0.0")
    paths.add(cache.entry_path("structure", program.signature, 2))
    monkeypatch.setattr(cache, "_source_digest", lambda: "edited")
    paths.add(cache.entry_path("structure", program.signature, 2))
    assert len(paths) == 6
