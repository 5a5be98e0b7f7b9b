"""What do ten turns of edits keep in memory, and what is gained by making several edits of one base in one run?

Two tables in one report. ``memory``: a base and ten edits, each of the one before, against a recording of its own for
each; bytes are counted by storage, so what is shared counts once. ``time``: ``edit_many`` of four prompts with one
mask against four edits one after the other, both with text encoder and VAE. Everything runs as the Editor does it by
default: its statistics of norms (``--norm`` names others), and every edit is recorded.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    machine,
    positive,
    prepare,
    versions,
)
from fisedit_compiler.pipelines import EDITOR_CONFIG

BASE = "a cat on the left and a rocket on the right, blue background"
PROMPTS = tuple(
    f"a {name} on the left and a rocket on the right, blue background" for name in ("dog", "fox", "panda", "frog")
)
LEFT = (0.2, 0.02, 0.85, 0.54)


def kept_bytes(recordings: list[Any]) -> int:
    """Bytes that recordings keep alive together; what they share counts once."""
    storages = {}
    for recording in recordings:
        for call in recording:
            held = [tensor.untyped_storage() for tensor in call.slots.tensors()]
            storages.update({storage.data_ptr(): storage.nbytes() for storage in held})
    return sum(storages.values())


def memory(editor: Any, base: Any, turns: int) -> dict[str, Any]:
    """A chain of edits whose masks wander over the picture and overlap."""
    from fisedit_compiler.masks import ellipse_mask

    height, width = base.latents[0].shape[-2:]
    edits = [base]
    for turn in range(turns):
        left = 0.02 + 0.4 * turn / max(turns - 1, 1)
        mask = ellipse_mask(height, width, (0.25, left, 0.75, left + 0.35))
        edits.append(editor.edit(edits[-1], PROMPTS[turn % len(PROMPTS)], mask=mask))
    recordings = [edit.recording for edit in edits]
    whole = base.recording.nbytes
    kept = kept_bytes(recordings)
    assert kept == whole + sum(recording.own_nbytes for recording in recordings[1:])
    areas = [edit.report.area for edit in edits[1:]]
    return {
        "what": "memory",
        "turns": turns,
        "mean_area": round(sum(areas) / len(areas), 4),
        "base_mib": round(whole / 2**20, 2),
        "turns_mib": round((kept - whole) / 2**20, 2),
        "as_recordings_mib": round(turns * whole / 2**20, 2),
        "ratio": round(turns * whole / (kept - whole), 2),
    }


def duration(editor: Any, base: Any, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same edits together and one by one."""
    from fisedit_compiler.masks import area, ellipse_mask

    height, width = base.latents[0].shape[-2:]
    mask = ellipse_mask(height, width, LEFT)

    def together(stopwatch: Stopwatch) -> None:
        edits = stopwatch.time("together", lambda: editor.edit_many(base, PROMPTS, mask=mask))
        stopwatch.add("together_unet", 1e3 * sum(seconds for edit in edits for _, seconds in edit.report.calls))

    def one_by_one(stopwatch: Stopwatch) -> None:
        edits = stopwatch.time("one_by_one", lambda: [editor.edit(base, prompt, mask=mask) for prompt in PROMPTS])
        stopwatch.add("one_by_one_unet", 1e3 * sum(seconds for edit in edits for _, seconds in edit.report.calls))

    stopwatch = alternate([together, one_by_one], repeats=options.repeats, warmup=options.warmup, device=device)
    row: dict[str, Any] = {"what": "time", "prompts": len(PROMPTS), "area": round(area(mask), 4)}
    for name in ("together", "one_by_one", "together_unet", "one_by_one_unet"):
        row |= stopwatch[name].as_dict(name)
    row["ratio"] = round(stopwatch["one_by_one"].median_ms / stopwatch["together"].median_ms, 3)
    row["unet_ratio"] = round(stopwatch["one_by_one_unet"].median_ms / stopwatch["together_unet"].median_ms, 3)
    return row


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    kept, timed = rows
    table = Table(title=title, caption="ratios above 1 are in favour of what this package does")
    for column in ("question", "here", "without", "ratio"):
        table.add_column(column, justify="left" if column == "question" else "right")
    question = f"memory of {kept['turns']} turns, {kept['mean_area']:.1%} of the sites each"
    table.add_row(question, f"{kept['turns_mib']} MiB", f"{kept['as_recordings_mib']} MiB", f"{kept['ratio']:.2f}")
    for name, ratio, label in (("", "ratio", "whole edits"), ("_unet", "unet_ratio", "UNet calls")):
        table.add_row(
            f"{timed['prompts']} edits in one run, {timed['area']:.1%} of the sites, {label}",
            f"{timed[f'together{name}_ms']:.0f} ± {timed[f'together{name}_iqr_ms']:.0f} ms",
            f"{timed[f'one_by_one{name}_ms']:.0f} ± {timed[f'one_by_one{name}_iqr_ms']:.0f} ms",
            f"{timed[ratio]:.2f}",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=5)
    parser.add_argument("--size", type=positive, default=256, help="height and width of the pictures")
    parser.add_argument("--steps", type=positive, default=10, help="of the scheduler; UNet calls of an edit")
    parser.add_argument("--turns", type=positive, default=10, help="edits in the chain")
    parser.add_argument("--warmup", type=positive, default=1, help="untimed repeats before the timed ones")
    parser.add_argument("--norm", default=EDITOR_CONFIG.norm, help="SparsifyConfig.norm; the default is the Editor's")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    from fisedit_compiler import Editor
    from fisedit_compiler.models import load_pipeline

    facts = machine(device)
    pipe = load_pipeline(device=device, dtype=dtype)
    with Editor(pipe, replace(EDITOR_CONFIG, norm=options.norm), progress=False) as editor:
        base = editor.generate(BASE, seed=7, num_inference_steps=options.steps, height=options.size, width=options.size)
        rows = [memory(editor, base, options.turns), duration(editor, base, options, device)]
    settings = {
        "model": "emoji-scenes",
        "latents": list(base.latents[0].shape),
        "steps": options.steps,
        "dtype": str(dtype).removeprefix("torch."),
        "norm": options.norm,
        "record": True,
        "turns": options.turns,
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    report = Report("multi_turn", settings, facts, versions(), rows)
    report.publish(
        draw(rows, f"{settings['model']}, latents {settings['latents']}, {options.steps} steps, norm {options.norm}"),
        options.json,
    )
    return report


if __name__ == "__main__":
    main()
