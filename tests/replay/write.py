"""Write what the package makes of every model of the zoo into a folder: ``python -m replay.write FOLDER``.

``FOLDER/<model>/<variant>/`` gets ``stages/`` (the graph after every pass), ``slots/``, ``plans/`` (the tables of two
masks), ``lowered/`` (what the backend is given on a GPU) and ``results/`` (digests of everything computed). Weights,
inputs and masks are the same every time, and so is what is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replay import access
from replay.text import graph_lines

VARIANTS: dict[str, dict[str, Any]] = {
    "recorded-cached": {},
    "recorded-active": {"attention": "active"},
    "incremental-cached": {"norm": "incremental"},
    "incremental-active": {"norm": "incremental", "attention": "active"},
    "blocks-of-2": {"block_size": 2},
    "densely": {"dense_above": 0.0},
}
"""Configurations by name; the last two run the first one's programs in another way."""
SAME_PROGRAMS = frozenset({"blocks-of-2", "densely"})
FEWER_VARIANTS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("sd21", "sdxl", "inpaint", "scale_shift"), ("recorded-cached", "incremental-active")
)
"""Models that are much like ``sd15``, and take long: with these variants both commits are done in a few minutes."""
TIMESTEPS = (481, 241)
"""A run has two calls, so that what is kept between calls takes part."""
SIZE = (16, 24)
COPIES = 2

Inputs = dict[str, Any]
Result = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the zoo, or some of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", type=Path, help="the folder that the package has to come from")
    parser.add_argument("--models", nargs="*", help="of these models only")
    parser.add_argument("--label", default="", help="stands before every line of progress")
    chosen = parser.parse_args(arguments)
    found = access.package_folder()
    if chosen.package is not None and found != chosen.package.resolve():
        sys.exit(f"fisedit_compiler was imported from {found}, not from {chosen.package}")
    torch.set_num_threads(1)
    for name in chosen.models or list(access.find("zoo").ZOO):
        start = time.perf_counter()
        write_model(name, chosen.folder / name)
        print(f"{chosen.label}{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def write_model(name: str, folder: Path, variants: Sequence[str] | None = None) -> None:
    """Write one model in the variants named, without any in those that it is to have."""
    zoo = access.find("zoo")
    model = zoo.ZOO[name]()
    for variant in variants or FEWER_VARIANTS.get(name, tuple(VARIANTS)):
        compiled = access.compile_model(model, VARIANTS[variant], is_known=name in zoo.UNETS)
        _write_variant(model, compiled, folder / variant, variant not in SAME_PROGRAMS)


def _write_variant(model: Any, compiled: Any, folder: Path, programs: bool) -> None:
    trial = Trial(model, compiled)
    results = trial.results(maps=programs and model.text_length > 0)
    _write(folder / "results" / "digests.json", [json.dumps(results, indent=1)])
    for mask, lines in trial.plans.items():
        _write(folder / "plans" / f"{mask}.txt", lines)
    if not programs:
        return
    for number, program in enumerate(access.programs_of(compiled)):
        constants = access.constants_of(program)
        if number == 0:
            _write(folder / "slots" / "0.txt", access.slot_lines(program, trial.slots))
        for section, graphs in (("stages", access.stage_graphs), ("lowered", access.lowered_graphs)):
            names: Counter[str] = Counter()
            for named in graphs(compiled, number):
                names[named.name] += 1
                again = f".{names[named.name]}" if names[named.name] > 1 else ""
                _write(folder / section / f"{number}-{named.name}{again}.txt", graph_lines(named, constants))
            _write(folder / section / f"{number}-names.txt", list(names))


class Trial:
    """One compiled model through recording, edits, an edit of an edit, copies and recorded maps."""

    def __init__(self, model: Any, compiled: Any) -> None:
        self.model, self.compiled = model, compiled
        self.masks = {"block": _block(3, 4), "scattered": _scattered()}
        self.plans: dict[str, list[str]] = {}
        self.slots: dict[str, Tensor] = {}
        self.base = self._run_inputs(model.make_inputs(2, *SIZE, 0), 11)
        self.edited = [self._edit(call, self.masks["block"], 1) for call in self.base]

    def results(self, *, maps: bool) -> dict[str, Result]:
        """Digests of everything, by what was done; of what is refused the class of the error.

        Args:
            maps: also record cross-attention maps and reuse them.
        """
        trials: dict[str, Callable[[], Result]] = {
            "dense": lambda: _outputs(self._call(self.base)),
            "recording": self._record,
            "edit": lambda: self._edited("block"),
            "edit of scattered sites": lambda: self._edited("scattered"),
            "edit of nothing": self._nothing,
            "edit without a mask": lambda: self._session(self.edited, None),
            "recorded edit": self._recorded_edit,
            "turn": self._turn,
            "copies": lambda: self._copies(None),
            "copies of two masks": lambda: self._copies([_block(3, 4), _block(8, 10)]),
        }
        if maps:
            trials |= {"maps": self._maps}
        return {name: _tried(name, run) for name, run in trials.items()}

    def _record(self) -> Result:
        with self.compiled.record() as self.recording:
            outputs = self._call(self.base)
        self.slots = dict(access.recorded_calls(self.recording)[0])
        return _outputs(outputs) | _slots(self.recording)

    def _edited(self, kind: str) -> Result:
        mask = self.masks[kind]
        with self.compiled.edit(self.recording, mask) as session:
            outputs = self._call([self._edit(call, mask, 1) for call in self.base])
        self.plans[kind] = access.plan_lines(session)
        return _outputs(outputs)

    def _nothing(self) -> Result:
        return self._session(self.base, torch.zeros(SIZE, dtype=torch.bool))

    def _session(self, calls: list[Inputs], mask: Tensor | None) -> Result:
        with self.compiled.edit(self.recording, mask):
            return _outputs(self._call(calls))

    def _recorded_edit(self) -> Result:
        with self.compiled.edit(self.recording, self.masks["block"], record=True) as session:
            outputs = self._call(self.edited)
        self.first_turn = session.result
        return _outputs(outputs) | _slots(self.first_turn)

    def _turn(self) -> Result:
        mask = self.masks["scattered"]
        with self.compiled.edit(self.first_turn, mask, record=True) as session:
            outputs = self._call([self._edit(call, mask, 2) for call in self.edited])
        return _outputs(outputs) | _slots(session.result)

    def _copies(self, masks: list[Tensor] | None) -> Result:
        own = masks or [self.masks["block"]] * COPIES
        calls = [
            _interleaved([self._edit(call, mask, 3 + copy) for copy, mask in enumerate(own)], call["sample"].shape[0])
            for call in self.base
        ]
        mask = self.masks["block"] if masks is None else torch.stack(masks)
        with self.compiled.edit(self.recording, mask, copies=COPIES, record=True) as session:
            digests = _outputs(self._call(calls))
        for copy, recording in enumerate(session.results):
            digests |= _slots(recording, f"copy {copy} ")
        return digests

    def _maps(self) -> Result:
        with self.compiled.record(maps=1) as recording:
            digests = _outputs(self._call(self.base)) | _slots(recording)
        columns = torch.arange(self.model.text_length)
        columns[1::3] = -1
        with self.compiled.edit(recording, record=True) as session:
            session.reuse_maps(columns)
            outputs = self._call([{**call, "sample": base["sample"]} for call, base in self._pairs()])
        return digests | {f"reusing {name}": value for name, value in _outputs(outputs).items()}

    def _pairs(self) -> Iterator[tuple[Inputs, Inputs]]:
        return zip(self.edited, self.base, strict=True)

    def _run_inputs(self, first: Inputs, seed: int) -> list[Inputs]:
        noise = torch.randn(first["sample"].shape, generator=torch.Generator().manual_seed(seed))
        calls = [first, {**first, "sample": 0.9 * first["sample"] + 0.1 * noise}]
        if "timestep" in first:
            calls = [{**call, "timestep": torch.tensor(t)} for call, t in zip(calls, TIMESTEPS, strict=True)]
        return calls

    def _edit(self, inputs: Inputs, mask: Tensor, seed: int) -> Inputs:
        edited: Inputs = self.model.edit_inputs(inputs, mask, seed)
        return edited

    def _call(self, calls: list[Inputs]) -> list[Any]:
        return [self.compiled(**call) for call in calls]


def _tried(name: str, run: Callable[[], Result]) -> Result:
    try:
        with torch.no_grad():
            return run()
    except Exception as error:
        # Some models refuse some of it. What is not meant to be refused has no digests at one commit, and is seen.
        print(f"  {name}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
        return {"refused": type(error).__name__}


def _outputs(outputs: list[Any]) -> Result:
    first = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    return {f"output of call {number}": access.digest(output) for number, output in enumerate(first)}


def _slots(recording: Any, prefix: str = "") -> Result:
    return {
        f"{prefix}call {number} ${name}": access.digest(value)
        for number, slots in enumerate(access.recorded_calls(recording))
        for name, value in slots.items()
    }


def _interleaved(copies: list[Inputs], batch: int) -> Inputs:
    """The inputs of several copies in one call, every sample's copies side by side."""

    def merged(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {name: merged([value[name] for value in values]) for name in first}
        if isinstance(first, Tensor) and first.dim() and first.shape[0] == batch:
            return torch.stack(values, 1).flatten(0, 1)
        return first

    return {name: merged([copy[name] for copy in copies]) for name in copies[0]}


def _block(top: int, left: int) -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top : top + 5, left : left + 7] = True
    return mask


def _scattered() -> Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(5)) < 0.06


def _write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
