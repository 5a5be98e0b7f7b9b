"""The folder of an evaluation: one record per pair, written whole or not at all, so that a run can stop anywhere.

```
OUT/config.json          what the results are of; another configuration is refused
OUT/run.json             command, machine, versions, lines that were rejected
OUT/pairs/000123.json    the record of the pair in line 123
OUT/pairs/000123.safetensors   its features, for FID
OUT/images/000123/       its pictures
OUT/results.json, OUT/report.html
```
Several processes may write to one folder: every file is made under another name, synced and then renamed. A pair's
record is written after its features and pictures, so what a record names is there, after a crash too. A file that is
damaged counts as not there: :mod:`~fisedit_compiler.evaluation.results.records` says what a record must hold.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from fisedit_compiler.errors import ConfigError, FiseditError, PictureError
from fisedit_compiler.evaluation.results import records
from fisedit_compiler.files import sync_folder, write_whole
from fisedit_compiler.pipelines.inversion.pictures import read_picture

logger = logging.getLogger(__name__)

_OURS = ("config.json", "run.json", "results.json", "report.html", "quality.md")
_FOLDERS = ("pairs", "images")


class StoreError(FiseditError):
    """The folder cannot be written to, such as when the disk is full; what was finished stays."""


class Store:
    """An evaluation's folder.

    Args:
        folder: need not exist; see :meth:`open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def config(self) -> dict[str, Any]:
        """The configuration its results are of.

        Raises:
            FiseditError: there is none, or it is damaged, so this is no evaluation's folder.
        """
        try:
            return records.check_config(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise FiseditError(
                f"{str(self.folder)!r} holds no evaluation (config.json: {error}); name the --output of one, or run "
                "`fisedit eval PAIRS.jsonl --output ...` first"
            ) from error

    @property
    def run_facts(self) -> dict[str, Any]:
        """What is known of the run (``run.json``): command, machine, versions; without what is missing or damaged."""
        return records.sound_facts(_json(self.folder / "run.json"))

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Make the folder if need be, before anything expensive is done, and check what is in it.

        Raises:
            ConfigError: it holds results of another configuration; the message says what differs.
            FiseditError: it cannot be written to.
        """
        try:
            for name in _FOLDERS:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if (self.folder / "config.json").is_file():
            self._check(config)

    def open(self, config: Mapping[str, Any]) -> None:
        """From now on the folder's results are of this configuration. Same errors as :meth:`prepare`."""
        self.prepare(config)
        if not (self.folder / "config.json").is_file():
            self.write_text("config.json", json.dumps(dict(config), indent=1))
        # Read back: another process may have been first, with another configuration.
        self._check(config)

    def _check(self, config: Mapping[str, Any]) -> None:
        found, wanted = self.config, json.loads(json.dumps(dict(config)))
        if found == wanted:
            return
        differences = "; ".join(
            f"{name}: {_short(found.get(name))} there, {_short(wanted.get(name))} now"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        )
        raise ConfigError(
            f"{str(self.folder)!r} holds results of another configuration ({differences}). Repeat its options to go on "
            "with it, choose another --output, or start over with --fresh, which deletes them"
        )

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot write to {str(self.folder)!r} ({error.strerror or error}); choose another --output, or make room "
            "and repeat the command: pairs that are finished stay"
        )

    def clear(self) -> None:
        """Delete what an evaluation wrote, nothing else.

        Raises:
            StoreError: it cannot be deleted.
        """
        if not (self.folder / "config.json").is_file():
            return
        try:
            for name in _OURS:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def record(self, line: int) -> dict[str, Any] | None:
        """The record of a pair; ``None`` if it was not run yet or its file is damaged."""
        found = _json(self._path(line))
        return found if records.is_sound(found, line) else None

    def is_done(self, line: int) -> bool:
        """Whether a pair was run; one that failed, or whose files are damaged, was not and is tried again."""
        record = self.record(line)
        return record is not None and record["status"] == "done" and self._features(line) is not None

    def records(self) -> list[dict[str, Any]]:
        """All records by line, without those that are damaged."""
        names = [path.stem for path in (self.folder / "pairs").glob("*.json")]
        lines = sorted({int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 19})
        return [record for record in map(self.record, lines) if record is not None]

    def features(self, line: int) -> dict[str, Tensor]:
        """Features of a pair's pictures by name, each ``[D]``; ``{}`` if there are none or they are damaged."""
        return self._features(line) or {}

    def _features(self, line: int) -> dict[str, Tensor] | None:
        """Features, ``{}`` without a file, ``None`` if it is damaged."""
        path = self._path(line).with_suffix(".safetensors")
        try:
            found = load(path.read_bytes())
        except FileNotFoundError:
            return {}
        except Exception:  # anything may stand in a damaged file, and safetensors raises in many ways
            return None
        sound = "base" in found and all(tensor.ndim == 1 and tensor.is_floating_point() for tensor in found.values())
        return found if sound else None

    def write(self, record: Mapping[str, Any], features: Mapping[str, Tensor]) -> None:
        """Keep a pair's record; it counts as run from then on, so it is the last file to be written.

        Raises:
            StoreError: it cannot be written.
        """
        line = int(record["line"])
        if features:
            self.write_bytes(f"pairs/{line:06d}.safetensors", save(dict(features)))
        self.write_text(f"pairs/{line:06d}.json", json.dumps(dict(record)))

    def write_image(self, line: int, name: str, image: Image.Image, size: int | None = None) -> None:
        """Keep a picture as JPEG, reduced to ``size`` pixels if given."""
        picture = image.convert("RGB")
        if size is not None and max(picture.size) > size:
            picture.thumbnail((size, size), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        try:
            (self.folder / f"images/{line:06d}").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        sync_folder(self.folder / "images")
        self.write_bytes(f"images/{line:06d}/{name}.jpg", buffer.getvalue())

    def image(self, line: int, name: str) -> Image.Image | None:
        """A picture that was kept; ``None`` if there is none, and with a warning if its file is damaged."""
        path = self.folder / f"images/{line:06d}/{name}.jpg"
        if not path.is_file():
            return None
        try:
            return read_picture(path)
        except PictureError as error:  # one picture less, not a report less
            logger.warning("%s; it is left out: delete the pair's record and run again to make it anew", error)
            return None

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the folder whole or not at all; what is no character is written as an escape."""
        return self.write_bytes(name, text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file of the folder whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        path = self.folder / name
        try:
            write_whole(path, content)
        except OSError as error:
            raise self._unwritable(error) from error
        return path

    def _path(self, line: int) -> Path:
        return self.folder / f"pairs/{line:06d}.json"


def _json(path: Path) -> Any:
    """What a file holds; ``None`` if it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
