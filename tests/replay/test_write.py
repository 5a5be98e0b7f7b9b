"""The writer on the smallest model of the zoo, and what it makes of things that are described in two ways."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx

from replay import access
from replay.compare import Verdict, compare_folders
from replay.write import write_model


def test_a_model_is_written_the_same_twice(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_model("plain_conv", tmp_path / folder / "plain_conv", ["recorded-cached"])
    found = compare_folders(tmp_path / "one", tmp_path / "two")
    assert {file.verdict for file in found} == {Verdict.SAME}
    written = tmp_path / "one" / "plain_conv" / "recorded-cached"
    assert {path.name for path in written.iterdir()} == {"stages", "slots", "plans", "lowered", "results"}
    step = (written / "lowered" / "0-step.txt").read_text()
    assert "fisedit.pack_conv_weight(" in step  # a hoisted value is written with what takes it
    assert "input(ring_rows, $conv_in.input, {" in step
    results = json.loads((written / "results" / "digests.json").read_text())
    assert not [what for what, digests in results.items() if "refused" in digests]
    assert len(set(results["turn"].values()) - set(results["recording"].values())) > 4


@dataclass(frozen=True)
class CallInput:
    name: str


@dataclass(frozen=True)
class RingRowsInput:
    slot: str
    key: int


@pytest.mark.parametrize(
    ("by_class", "by_tuple"),
    [(CallInput("sample"), ("call", "sample")), (RingRowsInput("conv.input", 3), ("ring_rows", "conv.input", 3))],
)
def test_inputs_told_by_a_class_and_by_a_tuple_are_the_same(by_class: object, by_tuple: tuple[object, ...]) -> None:
    node = fx.Graph().placeholder("anything")
    node.meta["input"] = by_class
    assert access.input_of(node) == by_tuple


def test_a_place_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(access.PLACES, "lost", ("fisedit_compiler.nowhere:thing", "no_such_package"))
    with pytest.raises(LookupError, match="nowhere:thing, no_such_package"):
        access.find("lost")
    monkeypatch.setitem(access.PLACES, "moved", ("fisedit_compiler.nowhere:thing", "torch:Tensor"))
    assert access.find("moved") is torch.Tensor
