"""Logging through torch's channel: nothing by default, a line a pass, graphs on demand, artifacts for tlparse."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fisedit_compiler.inspect.stages import stages_of
from fisedit_compiler.passes import REWRITES
from tests.support.compiled_zoo import compiled_model

SCRIPT = """
import torch, fisedit_compiler
from torch import nn
module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).eval()
config = fisedit_compiler.SparsifyConfig(cache=False, multiple=1)
fisedit_compiler.sparsify(module, config, example_inputs={"input": torch.zeros(1, 4, 8, 8)})
"""


def run(**environment: str) -> str:
    """What a process that compiles a module prints."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=cleared | environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_nothing_is_printed_by_default() -> None:
    assert run() == ""


def test_torch_logs_shows_a_line_a_pass_and_with_a_plus_the_graphs() -> None:
    lines = run(TORCH_LOGS="fisedit_compiler")
    assert "fisedit_compiler" in lines and "convolution: " in lines and "+1 fisedit.conv2d_sites" in lines
    assert "graph after" not in lines
    assert "graph after convolution" in run(TORCH_LOGS="+fisedit_compiler")


def test_graphs_are_artifacts_for_tlparse(tmp_path: Path) -> None:
    run(TORCH_TRACE=str(tmp_path))
    (log,) = tmp_path.iterdir()
    found = []
    for line in log.read_text().splitlines():
        start = line.find("{")
        if start >= 0 and '"artifact"' in line:
            found.append(json.loads(line[start:])["artifact"]["name"])
    names = [name.split("_", 2)[2] for name in found if name.startswith("fisedit_")]
    made = ("lower", "recording", "stores", "update", "step")
    assert names == ["simplify", "capture", *(rewrite.name for rewrite in REWRITES), *made]


def test_every_pass_is_timed(caplog: pytest.LogCaptureFixture) -> None:
    program, *_ = compiled_model("sd15").programs
    with caplog.at_level(logging.INFO, "fisedit_compiler.passes"):
        stages_of(program)
    for name in (*(rewrite.name for rewrite in REWRITES), "step_staged", "step_cut", "update_repeated", "update_cut"):
        assert any(message.startswith(f"{name}: ") and " ms, " in message for message in caplog.messages)
