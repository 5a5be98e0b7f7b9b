"""Edit pairs: a caption, an instruction, the caption after it; read from jsonl line by line.

The fields are those of InstructPix2Pix (Brooks et al., CVPR 2023): ``input``, ``edit``, ``output``. A line that cannot
be used is named with its number and the reason, and the others still count. Nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisedit_compiler.errors import FiseditError, PromptError
from fisedit_compiler.pipelines.editing import refusals

Box = tuple[float, float, float, float]
"""``(top, left, bottom, right)`` as fractions of the picture."""

LOCAL_KINDS = ("object", "attribute", "size", "add")
"""Kinds of edit that change one object and leave the rest alone."""

SCENE_KINDS = ("background", "weather")
"""Kinds of edit that change the whole picture."""

OTHER_KINDS = ("overlay",)
"""Kinds of edit that change parts all over the picture: fireworks, a rainbow."""

KINDS = (*LOCAL_KINDS, *SCENE_KINDS, *OTHER_KINDS)

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class EditPair:
    """One edit to try.

    Attributes:
        input: caption of the base picture.
        edit: the instruction, for people; no method reads it.
        output: caption of the edited picture.
        seed: of the noise; ``None`` leaves it to the runner.
        region: where the changed object is, if that is known.
        kind: one of :data:`KINDS`, if that is known.
        line: number of the line it was read from, counted from 1; 0 if it was made otherwise.
    """

    input: str
    edit: str
    output: str
    seed: int | None = None
    region: Box | None = None
    kind: str | None = None
    line: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields of a jsonl line; those that are not known are left out."""
        fields: dict[str, Any] = {"input": self.input, "edit": self.edit, "output": self.output}
        optional = {"seed": self.seed, "region": self.region and list(self.region), "kind": self.kind}
        return fields | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True)
class RejectedLine:
    """A line that cannot be run, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class PairFile:
    """What a file of pairs holds.

    Attributes:
        path: the file.
        pairs: what can be run, in the order of the file.
        rejected: what cannot.
        digest: SHA-256 of the file's bytes.
    """

    path: Path
    pairs: tuple[EditPair, ...]
    rejected: tuple[RejectedLine, ...]
    digest: str

    def problems(self) -> list[str]:
        """``file:line: reason`` of every line that was rejected."""
        return [f"{self.path}:{item.line}: {item.reason}" for item in self.rejected]


def read_pairs(path: str | Path) -> PairFile:
    """Read a jsonl file of pairs. Fields other than those of :class:`EditPair` are ignored, and so are empty lines.

    Raises:
        FiseditError: the file cannot be read. A line that is no pair is no error: it is among the ``rejected``.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FiseditError(
            f"cannot read the pairs in {str(path)!r} ({error.strerror}); name a jsonl file with the fields input, edit "
            "and output, or make one with --make-pairs N"
        ) from error
    pairs, rejected = [], []
    # Only these end a line: str.splitlines() would also cut at characters that may stand inside a JSON string.
    for number, line in enumerate(content.replace(b"\r\n", b"\n").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            pairs.append(parse_line(line, number))
        except ValueError as error:
            rejected.append(RejectedLine(number, str(error)))
    return PairFile(path, tuple(pairs), tuple(rejected), hashlib.sha256(content).hexdigest())


def write_pairs(pairs: Sequence[EditPair], path: str | Path) -> None:
    """Write pairs as jsonl.

    Raises:
        FiseditError: the file cannot be written.
    """
    text = "".join(json.dumps(pair.to_dict(), ensure_ascii=False) + "\n" for pair in pairs)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FiseditError(f"cannot write the pairs to {str(path)!r} ({error.strerror}); name another file") from error


def check_prompts(pipe: Any, file: PairFile) -> PairFile:
    """The same file without the pairs whose captions the pipeline's text encoder cannot read to their end."""
    pairs, rejected = [], list(file.rejected)
    for pair in file.pairs:
        try:
            refusals.check_prompt(pipe, pair.input, "input")
            refusals.check_prompt(pipe, pair.output, "output")
            pairs.append(pair)
        except PromptError as error:
            rejected.append(RejectedLine(pair.line, str(error)))
    return PairFile(file.path, tuple(pairs), tuple(sorted(rejected, key=lambda item: item.line)), file.digest)


def parse_line(line: bytes | str, number: int = 0) -> EditPair:
    """One pair.

    Raises:
        ValueError: says what is wrong with the line.
    """
    fields = _json_object(line)
    missing = [name for name in ("input", "edit", "output") if name not in fields]
    if missing:
        raise ValueError(f"the field {' and '.join(missing)} is missing; a line needs input, edit and output")
    for name in ("input", "edit", "output"):
        if not isinstance(fields[name], str):
            raise ValueError(f"{name} must be text, not {type(fields[name]).__name__}")
        if not is_text(fields[name]):
            raise ValueError(f"{name} has half of a surrogate pair (\\ud800 to \\udfff), which no text encoder reads")
    before, after = fields["input"].strip(), fields["output"].strip()
    for name, value in (("input", before), ("output", after)):
        if not value:
            raise ValueError(f"{name} is empty; write the caption of the picture")
    if before == after:
        raise ValueError("input and output are the same caption: there is nothing to edit")
    return EditPair(before, fields["edit"].strip(), after, _seed(fields), _region(fields), _kind(fields), line=number)


def _json_object(line: bytes | str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not a pair: nested too deeply") from error
    except ValueError as error:  # Python reads no numbers of thousands of digits
        raise ValueError(f"not JSON that can be read ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a line must be a JSON object, not {type(fields).__name__}")
    return fields


def _seed(fields: dict[str, Any]) -> int | None:
    seed = fields.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, not {_short(seed)}")
    return seed


def _region(fields: dict[str, Any]) -> Box | None:
    region = fields.get("region")
    if region is None:
        return None
    numbers = isinstance(region, list) and all(
        isinstance(end, (int, float)) and not isinstance(end, bool) for end in region
    )
    if not numbers or len(region) != 4:
        raise ValueError(f"region must be four numbers [top, left, bottom, right], not {_short(region)}")
    top, left, bottom, right = region  # compared as they are: a whole number may be too large for a float
    if not (0.0 <= top < bottom <= 1.0 and 0.0 <= left < right <= 1.0):
        raise ValueError(
            f"region {_short(region)} is not [top, left, bottom, right] in fractions of the picture, "
            "with 0 <= top < bottom <= 1 and 0 <= left < right <= 1"
        )
    return float(top), float(left), float(bottom), float(right)


def _kind(fields: dict[str, Any]) -> str | None:
    kind = fields.get("kind")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {_short(kind)} is unknown; leave it out or use one of {', '.join(KINDS)}")
    return kind


def is_text(value: str) -> bool:
    """Whether every character stands for itself: JSON may hold one half of a pair that makes a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
