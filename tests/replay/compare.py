"""How two folders of ``write.py`` differ: ``python -m replay.compare BASE NOW``.

Every file is one of

``same``             the same text
``names only``       the same but for names of nodes and slots: equal once they are numbered as they come
``order only``       the same lines in another order
``names and order``  the same computations: equal, sorted, once every node stands for what it is computed from
``different``        anything else, also a file that only one of the folders has

Of results the digests count: a slot of another name with the same bytes is ``names only``. The exit status is 1 if
something is ``different``, else 0.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

SECTIONS = ("stages", "slots", "plans", "lowered", "results")
_NODE = re.compile(r"%[\w.]+")
_NAME = re.compile(r"[%$][\w.]+")
_DEFINITION = re.compile(r"(%[\w.]+) = ")


class Verdict(IntEnum):
    """How two texts differ, from nothing on upwards."""

    SAME = 0
    NAMES = 1
    ORDER = 2
    NAMES_AND_ORDER = 3
    DIFFERENT = 4

    def __str__(self) -> str:
        return ("same", "names only", "order only", "names and order", "different")[self]

    def with_(self, other: Verdict) -> Verdict:
        """The verdict on two files together."""
        if {self, other} == {Verdict.NAMES, Verdict.ORDER}:
            return Verdict.NAMES_AND_ORDER
        return max(self, other)


@dataclass(frozen=True)
class Compared:
    """One file of both folders, or of one of them.

    Attributes:
        base: its path in the folder of the base, ``None`` if it is not there.
        now: its path in the other.
        verdict: how they differ.
        diff: a unified diff of their lines.
    """

    base: str | None
    now: str | None
    verdict: Verdict
    diff: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return str(self.now if self.base is None else self.base)

    @property
    def title(self) -> str:
        if self.base is None:
            return f"{self.now}: only now"
        if self.now is None:
            return f"{self.base}: only at the base"
        return f"{self.base}: {self.verdict}" if self.base == self.now else f"{self.base} -> {self.now}: {self.verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the differences and a table of them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--lines", type=int, default=40, help="lines of a diff that are printed; 0 for all")
    parser.add_argument("--diff", type=Path, help="a file that takes the whole diffs")
    chosen = parser.parse_args(arguments)
    found = compare_folders(chosen.base, chosen.now)
    if chosen.diff is not None:
        chosen.diff.write_text("".join(f"{line}\n" for line in report(found, 0)), encoding="utf-8")
    print("\n".join([*report(found, chosen.lines), *summary(found)]))
    return int(not found or any(file.verdict is Verdict.DIFFERENT for file in found))


def compare_folders(base: Path, now: Path) -> list[Compared]:
    """Compare all files, in the order of their paths.

    A file that one folder does not have is looked for under another name beside it: a pass may have been renamed.
    """
    before, after = _texts(base), _texts(now)
    found = [_compare(path, path, before[path], after[path]) for path in before.keys() & after.keys()]
    lost = {path: before[path] for path in sorted(before.keys() - after.keys())}
    new = {path: after[path] for path in sorted(after.keys() - before.keys())}
    for path, text in list(lost.items()):
        for other in [other for other in new if Path(other).parent == Path(path).parent]:
            compared = _compare(path, other, text, new[other])
            if compared.verdict is not Verdict.DIFFERENT:
                found.append(Compared(path, other, compared.verdict.with_(Verdict.NAMES), compared.diff))
                del lost[path], new[other]
                break
    found += [Compared(path, None, Verdict.DIFFERENT) for path in lost]
    found += [Compared(None, path, Verdict.DIFFERENT) for path in new]
    return sorted(found, key=lambda file: file.path)


def compare_graphs(base: Sequence[str], now: Sequence[str]) -> Verdict:
    """How two lists of lines differ, of graphs or of anything else that marks names by ``%`` and ``$``."""
    if list(base) == list(now):
        return Verdict.SAME
    if _numbered(base) == _numbered(now):
        return Verdict.NAMES
    if sorted(base) == sorted(now):
        return Verdict.ORDER
    if Counter(_meanings(base)) == Counter(_meanings(now)):
        return Verdict.NAMES_AND_ORDER
    return Verdict.DIFFERENT


def compare_results(base: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> Verdict:
    """How digests differ: by what was computed and name, and without names by what was computed only."""
    if base == now:
        same_order = json.dumps(base) == json.dumps(now)
        return Verdict.SAME if same_order else Verdict.ORDER
    if base.keys() != now.keys():
        return Verdict.DIFFERENT
    verdict = Verdict.SAME
    for what, digests in base.items():
        before, after = list(digests.items()), list(now[what].items())
        if [value for _, value in before] == [value for _, value in after]:
            found = Verdict.SAME if before == after else Verdict.NAMES
        elif sorted(before) == sorted(after):
            found = Verdict.ORDER
        elif Counter(digests.values()) == Counter(now[what].values()) and _outputs(digests) == _outputs(now[what]):
            found = Verdict.NAMES_AND_ORDER
        else:
            return Verdict.DIFFERENT
        verdict = verdict.with_(found)
    return verdict


def _outputs(digests: Mapping[str, str]) -> dict[str, str]:
    """The digests that are not of slots: nothing may take their place."""
    return {name: value for name, value in digests.items() if "$" not in name}


def report(found: Sequence[Compared], lines: int) -> Iterator[str]:
    """The files that differ, with the first lines of their diffs: fewer where only names or order differ, all for 0."""
    for file in found:
        if file.verdict is Verdict.SAME:
            continue
        limit = lines if file.verdict is Verdict.DIFFERENT else min(lines, 6)
        changes = file.diff[2:]  # behind the names of the two files, which the title has
        shown = changes[:limit] if lines else changes
        yield f"== {file.title}"
        yield from shown
        if len(shown) < len(changes):
            yield f"   ... {len(changes) - len(shown)} lines more"


def summary(found: Sequence[Compared]) -> list[str]:
    """A table: for every model and section the verdict on its files together."""
    verdicts: dict[str, dict[str, Verdict]] = defaultdict(dict)
    for file in found:
        model, _, section, *_ = file.path.split("/")
        verdicts[model][section] = verdicts[model].get(section, Verdict.SAME).with_(file.verdict)
    if not verdicts:
        return ["nothing was written"]
    rows = [["model", *SECTIONS]]
    rows += [[model, *(str(of.get(section, "-")) for section in SECTIONS)] for model, of in verdicts.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    worst = max(verdict for of in verdicts.values() for verdict in of.values())
    differing = sum(file.verdict is not Verdict.SAME for file in found)
    tail = "all same" if worst is Verdict.SAME else f"{differing} are not the same"
    return ["", *table, "", f"{len(found)} files compared, {tail}"]


def _texts(folder: Path) -> dict[str, str]:
    """The files at ``model/variant/section/name``, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*/*/*/*"))
        if path.is_file()
    }


def _compare(base: str, now: str, before: str, after: str) -> Compared:
    if before == after:
        return Compared(base, now, Verdict.SAME)
    lines = before.splitlines(), after.splitlines()
    if base.endswith(".json"):
        verdict = compare_results(json.loads(before), json.loads(after))
    else:
        verdict = compare_graphs(*lines)
    diff = difflib.unified_diff(*lines, f"base/{base}", f"now/{now}", lineterm="", n=0)
    return Compared(base, now, verdict, tuple(diff))


def _numbered(lines: Sequence[str]) -> list[str]:
    """The lines with names of nodes and slots numbered as they first stand."""
    numbers: dict[str, str] = {}
    return [_NAME.sub(lambda m: numbers.setdefault(m[0], f"{m[0][0]}{len(numbers)}"), line) for line in lines]


def _meanings(lines: Sequence[str]) -> list[str]:
    """The lines with a digest for every node: of its own line, and so of all that it is computed from."""
    meant: dict[str, str] = {}
    result = []
    for line in lines:
        defined = _DEFINITION.match(line)
        code = line[defined.end() :] if defined else line
        meaning = _NODE.sub(lambda m: meant.get(m[0], "%?"), code)
        result.append(meaning)
        if defined:
            meant[defined[1]] = "%" + hashlib.sha256(meaning.encode()).hexdigest()[:24]
    return result


if __name__ == "__main__":
    raise SystemExit(main())
