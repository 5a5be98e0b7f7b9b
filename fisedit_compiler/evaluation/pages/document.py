"""``docs/quality.md`` from results, by ``python -m fisedit_compiler.evaluation.pages.document``.

No figure of that document is typed by hand. The first results are those of the methods, further ones (of the
approximations, of reuse across steps) get their own section. ``--figure FILE.svg`` also writes the curve that the
document shows, ``--pictures OUT FILE.jpg`` a sheet of pictures of the evaluation in the folder ``OUT``, which is that
of the first results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.evaluation.pages import tables
from fisedit_compiler.evaluation.pages.curve import as_svg, trade_off
from fisedit_compiler.evaluation.pages.report import grids
from fisedit_compiler.evaluation.pages.sheet import picture_sheet
from fisedit_compiler.evaluation.pages.tables import Grid
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.runtime.sessions.reuse import TOLERANCE

SHEET_ROWS = 8
"""Pairs on the sheet of pictures."""
SHEET_QUALITY = 85
"""Of its JPEG file."""

INTRODUCTION = """# How good sparse edits are

`fisedit eval` measured every figure on this page. Several methods edit pairs of captions, from the same noise. The
tables use these words:

- The *base* is the picture of the first caption.
- *Dense, same seed* is the second caption, drawn by the unmodified model from the base's noise. It has all of the edit,
  and it keeps nothing of the base on purpose.
- *Directional similarity* says how well the change of the picture, from base to edit, points where the change of the
  caption points: the cosine of the two changes (CLIP embeddings, Gal et al. 2022). It is 0 where nothing changed.
- *Image similarity* says how much of the base is left in the eyes of CLIP: the cosine of the embeddings of base and
  edit.
- *Outside the mask* are the same pixels for all methods of a pair: those that the automatic mask of the sparse edit
  leaves alone. Equal pictures count as 100 dB. For SSIM and the distance the base's pixels replace the inside, so that
  windows that reach into it see no change there.
- The *distance* is LPIPS-style, not LPIPS. It uses squared differences of unit-length features of all layers of the
  CLIP's vision tower.
- *FID* compares sets of CLIP features, unless the run names another extractor. FIDs of few pictures are too large, so
  compare it within one table only.
- The *changed object* is found by looking. On a plain background it is what differs from a smooth backdrop in the base
  and in the dense regeneration, without shadows. In a scene the largest parts in which the two pictures differ stand
  for it. This is an approximation, so the tables keep it apart: a mountain that moved behind the object counts as
  object. *Outside the objects* are all other pixels.
- *Seconds* are wall time from prompt to picture, without what had to be prepared for the comparison. They are medians,
  since the first edit of a process may compile.
"""

_APPROXIMATIONS = """Every row edits inside the same mask from the first call on: the one that the default edit found.
So nothing but the approximation differs.

- *Pinned program* is the meaning of the default: the dense model whose inactive sites are overwritten by the base's at
  every step of the graph.
- *Dense with blending* approximates nothing inside the mask.
"""

_REUSE = f"""All rows but *dense* and *sparse* edit inside the same mask from the first call on: the one that the
default edit found. A tolerance says how far the base run may move, in all, while an edit keeps what came up from
coarser levels. `"auto"`, with which the Editor runs, is {TOLERANCE:g}.
"""

_ORIGIN = """## How this page is made

Nobody typed a figure or a table. This command writes the page:

```console
$ {command}
```
"""

_PICTURES = """![Pictures of a pair per row: base, mask, and a column for each method]({path})

The rows show pairs of every kind in turn, the first of the file. Below a picture are its directional and its image
similarity. Below the mask is its area.
"""


def document(
    results: Sequence[Mapping[str, Any]],
    command: str,
    figure: str | None = None,
    notes: Sequence[str] = (),
    pictures: str | None = None,
) -> str:
    """The document as Markdown.

    Args:
        results: contents of ``results.json`` files, those of the methods first.
        command: the command line that writes it.
        figure: path of the curve as seen from the document, of the results with most methods; left out without one.
        notes: what a reader must know about each of the results, in their order; an empty one says nothing.
        pictures: path of a sheet of pictures of the first results, as seen from the document.
    """
    parts = [INTRODUCTION]
    for number, item in enumerate(results):
        parts.append(f"## {_title(item)}")
        if number < len(notes) and notes[number]:
            parts.append(notes[number])
        parts.append(_run(item))
        if _has(item, "pinned"):
            parts.append(_APPROXIMATIONS)
        else:
            parts += [_REUSE] if _has(item, "reuse@") else []
            parts.append(markdown(tables.check_table(item)))
        if figure is not None and item is with_curve(results):
            parts.append(f"![Directional similarity against image similarity, a point or a curve per method]({figure})")
        if pictures is not None and number == 0:
            parts.append(_PICTURES.format(path=pictures))
        parts += [markdown(grid) for grid in grids(item)]
        parts.append(_left_out(item))
    parts.append(_ORIGIN.format(command=command))
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def with_curve(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The results whose curve is drawn: those of the most methods, approximations only if there are no others."""
    of_methods = [item for item in results if not _has(item, "pinned") and not _has(item, "reuse@")]
    return max(of_methods or results, key=lambda item: len(item["methods"]))


def _title(results: Mapping[str, Any]) -> str:
    if _has(results, "pinned"):
        return "What each approximation costs"
    if _has(results, "reuse@"):
        return "What reuse across steps costs"
    return f"Methods compared on {results['counts']['done']} pairs"


def _has(results: Mapping[str, Any], method: str) -> bool:
    """Whether a method ran, or one of a family such as ``"reuse@"``."""
    return any(item["name"] == method or item["name"].startswith(method) for item in results["methods"])


def markdown(grid: Grid) -> str:
    """A table in Markdown."""
    head = "| " + " | ".join(map(_escaped, grid.header)) + " |"
    rule = "|---" + "|---:" * (len(grid.header) - 1) + "|"
    rows = ["| " + " | ".join(map(_escaped, row)) + " |" for row in grid.rows]
    return "\n".join([f"### {grid.title}", "", head, rule, *rows, *(["", grid.note] if grid.note else [])])


def _run(results: Mapping[str, Any]) -> str:
    config, run, counts = results["configuration"], results["run"], results["counts"]
    rows = {
        "pairs": f"{counts['done']} done, {counts['failed']} failed, {counts['rejected']} lines rejected",
        "model": config["model"],
        "CLIP": config["clip"],
        "FID features": config["features"],
        "run": f"{config['steps']} steps, guidance {config['guidance']:g}, {config['dtype']}, backend "
        f"{config['backend']}{_statistics(config)}",
        "machine": _listed(run.get("machine", {})),
        "versions": _listed(run.get("versions", {})),
    }
    table = "\n".join(f"| {name} | {_escaped(str(value))} |" for name, value in rows.items())
    shards = run.get("shards", 1)
    shared = (
        f"{shards} processes shared the device, so seconds an edit are longer than alone. Compare rows only.\n\n"
        if shards > 1
        else ""
    )
    commands = [command for command in (run.get("pairs_command"), run.get("command")) if command]
    console = "\n".join(f"$ {command}" for command in commands)
    return f"| | |\n|---|---|\n{table}\n\n{shared}```console\n{console}\n```\n"


def _listed(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _statistics(config: Mapping[str, Any]) -> str:
    """How sparse edits normalise; results from before the Editor had a choice do not say."""
    return f", norm {config['norm']}" if "norm" in config else ""


def _left_out(results: Mapping[str, Any]) -> str:
    lines = [
        f"- `{method['name']}` had nothing to do for {count} pairs: {reason}."
        for method in results["methods"]
        for reason, count in method["skipped"].items()
    ]
    lines += [f"- line {item['line']} failed: {item['error']}" for item in results["failed"]]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def read_results(path: Path) -> dict[str, Any]:
    """The contents of a ``results.json``.

    Raises:
        FiseditError: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != 1:
            raise FiseditError(f"{path} has format {found['format']}, this version reads 1; evaluate again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FiseditError(f"{path} is no results.json of `fisedit eval` ({error!r})") from error
    return dict(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read results, print the document."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json of the methods, then of the approximations")
    parser.add_argument("--figure", type=Path, help="write the curve here; give the path from the repository's root")
    parser.add_argument(
        "--pictures", nargs=2, type=Path, metavar=("OUT", "FILE"), help="write a sheet of pictures here"
    )
    parser.add_argument("--note", action="append", default=[], metavar="TEXT", help="about the first, the second ...")
    parser.add_argument("--document", type=Path, default=Path("docs/quality.md"), help="where the document will be")
    options = parser.parse_args(arguments)
    results = [read_results(path) for path in options.results]
    words = [str(path) for path in options.results]
    figure = pictures = None
    if options.figure is not None:
        options.figure.write_text(as_svg(trade_off(with_curve(results))), encoding="utf-8")
        figure = _seen_from(options.document, options.figure)
        words += ["--figure", str(options.figure)]
    if options.pictures is not None:
        folder, file = options.pictures
        picture_sheet(Store(folder), results[0], SHEET_ROWS).save(file, quality=SHEET_QUALITY)
        pictures = _seen_from(options.document, file)
        words += ["--pictures", folder.name, str(file)]
    words += [word for note in options.note for word in ("--note", shlex.quote(note))]
    command = f"python -m fisedit_compiler.evaluation.pages.document {' '.join(words)} > {options.document}"
    print(document(results, command, figure, options.note, pictures), end="")


def _seen_from(document: Path, file: Path) -> str:
    return Path(os.path.relpath(file, document.parent)).as_posix()


if __name__ == "__main__":
    main()
