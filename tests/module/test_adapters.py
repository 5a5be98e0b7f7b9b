"""LoRA adapters of PEFT: what is recorded is what the model computes with the adapters that are active now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from tests.module.test_model_changes import MASK, SAMPLE, TEXT, Net

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


def with_adapters(net: Net, *names: str) -> Any:
    for number, name in enumerate(names):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=2, target_modules=["to_k", "conv"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, net, adapter_name=name)
    return net.eval().requires_grad_(False)


def layers(module: SparseModule) -> list[Any]:
    return [part for part in module.original.modules() if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer)]


def select(module: SparseModule, *names: str) -> None:
    for layer in layers(module):
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(list(names))
    module.original.requires_grad_(False)


@pytest.fixture
def module() -> SparseModule:
    torch.manual_seed(0)
    return sparsify(with_adapters(Net(), "A", "B"), SparsifyConfig(multiple=1, dense_above=1.0, cache=False))


def recorded(module: SparseModule) -> tuple[Any, Tensor]:
    with module.record() as recording:
        output = module(sample=SAMPLE, text=TEXT)
    assert torch.equal(output, module.original(sample=SAMPLE, text=TEXT)), "the recording is the model's own run"
    return recording, output


def test_every_choice_of_adapters_is_a_model_of_its_own(module: SparseModule) -> None:
    runs = {}
    for names in [("A",), ("B",), (), ("A", "B")]:
        select(module, *names)
        runs[names] = recorded(module)
    outputs = [output for _, output in runs.values()]
    assert not any(torch.equal(left, right) for left in outputs for right in outputs if left is not right)
    for names in runs:
        select(module, *names)
        for others, (recording, output) in runs.items():
            if others == names:
                with module.edit(recording, MASK):
                    assert torch.allclose(module(sample=SAMPLE, text=TEXT), output, atol=1e-5)
            else:
                with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
                    pass
    assert len(module.programs) == len(runs)


def test_a_scale_is_part_of_the_model(module: SparseModule) -> None:
    select(module, "A")
    recording, _ = recorded(module)
    layers(module)[0].scaling["A"] *= 0.5
    with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
        pass
    recorded(module)


def test_a_merged_adapter_is_another_model_and_back(module: SparseModule) -> None:
    select(module, "A")
    recording, _ = recorded(module)
    kept = [layer.get_base_layer().weight.clone() for layer in layers(module)]
    for layer in layers(module):
        layer.merge()
    with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
        pass
    recorded(module)
    for layer, weight in zip(layers(module), kept, strict=True):
        layer.unmerge()
        layer.get_base_layer().weight.data.copy_(weight)
    with module.edit(recording, MASK):
        module(sample=SAMPLE, text=TEXT)


def test_adapters_loaded_and_removed_again() -> None:
    torch.manual_seed(0)
    module = sparsify(Net().eval().requires_grad_(False), SparsifyConfig(multiple=1, dense_above=1.0, cache=False))
    before, output = recorded(module)
    parts = dict(module.original.named_children())
    with_adapters(module.original, "A")  # type: ignore[arg-type]
    assert not torch.equal(recorded(module)[1], output)
    for layer in layers(module):
        layer.delete_adapter("A")
    recorded(module)
    for name, part in parts.items():
        setattr(module.original, name, part)
    if hasattr(module.original, "peft_config"):
        del module.original.peft_config
    assert torch.equal(recorded(module)[1], output)
    with module.edit(before, MASK):
        assert torch.allclose(module(sample=SAMPLE, text=TEXT), output, atol=1e-5)


def test_another_process_takes_no_others_graph_from_disk(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from fisedit_compiler import SparsifyConfig, sparsify\n"
        "from tests.module.test_adapters import *\n"
        "torch.manual_seed(0)\n"
        "module = sparsify(with_adapters(Net(), 'A', 'B'), SparsifyConfig(multiple=1, dense_above=1.0))\n"
        "select(module, *sys.argv[1:])\n"
        "recorded(module)\n"
        "print(module.programs[0].from_cache)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "FISEDIT_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}

    def run(*names: str) -> str:
        command = [sys.executable, "-c", script, *names]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-1]

    assert [run("A"), run("B"), run(), run("A")] == ["False", "False", "False", "True"]


def test_a_pipeline_whose_lora_is_switched_off_loaded_and_unloaded() -> None:
    from tests.support.compiled import run_pipeline
    from tests.support.tiny_pipeline import make_tiny_pipeline

    pipe = make_tiny_pipeline()
    unet = pipe.unet
    pipe.unet = compiled = sparsify(unet, SparsifyConfig(dense_above=1.0))
    states = []

    def record() -> Any:
        with compiled.record() as recording:
            latents = run_pipeline(pipe)
        assert torch.equal(latents, run_pipeline(pipe))
        states.append(latents)
        return recording

    first = record()
    torch.manual_seed(1)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    unet.requires_grad_(False)
    second = record()
    unet.disable_adapters()
    off = record()
    assert not torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    assert second.model != off.model
    unet.enable_adapters()
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:9, 3:9] = True
    with compiled.edit(second, mask):
        run_pipeline(pipe)
    with pytest.raises(RecordingError, match="of another model"), compiled.edit(off, mask):
        pass
    pipe.unload_lora_weights()
    with compiled.edit(first, mask):
        run_pipeline(pipe, "a dog")
    assert record().model == first.model
