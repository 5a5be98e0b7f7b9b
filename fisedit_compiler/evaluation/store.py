"""The folder of an evaluation: one record per pair, written whole or not at all, so that a run can stop anywhere.

```
OUT/config.json          what the results are of; another configuration is refused
OUT/run.json             command, machine, versions, lines that were rejected
OUT/pairs/000123.json    the record of the pair in line 123
OUT/pairs/000123.safetensors   its features, for FID
OUT/images/000123/       its pictures
OUT/results.json, OUT/report.html
```
Several processes may write to one folder: every file is made under another name and then renamed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from fisedit_compiler.errors import ConfigError, FiseditError, PictureError
from fisedit_compiler.pipelines.pictures import read_picture

logger = logging.getLogger(__name__)

_OURS = ("config.json", "run.json", "results.json", "report.html", "quality.md")
_FOLDERS = ("pairs", "images")


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
            FiseditError: there is none, so this is no evaluation's folder.
        """
        path = self.folder / "config.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise FiseditError(
                f"{str(self.folder)!r} holds no evaluation ({path.name}: {error}); name the --output of one, or run "
                "`fisedit eval PAIRS.jsonl --output ...` first"
            ) from error
        return found

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
            try:
                self.write_text("config.json", json.dumps(dict(config), indent=1))
            except OSError as error:
                raise self._unwritable(error) from error
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

    def _unwritable(self, error: OSError) -> FiseditError:
        return FiseditError(f"cannot write to {str(self.folder)!r} ({error.strerror}); choose another --output")

    def clear(self) -> None:
        """Delete what an evaluation wrote, nothing else."""
        if not (self.folder / "config.json").is_file():
            return
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in _OURS:
            (self.folder / name).unlink(missing_ok=True)

    def record(self, line: int) -> dict[str, Any] | None:
        """The record of a pair; ``None`` if it was not run yet or its file is damaged."""
        try:
            found: dict[str, Any] = json.loads(self._path(line).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return found

    def is_done(self, line: int) -> bool:
        """Whether a pair was run; one that failed was not and is tried again."""
        record = self.record(line)
        return record is not None and record.get("status") == "done"

    def records(self) -> list[dict[str, Any]]:
        """All records by line."""
        lines = sorted(int(path.stem) for path in (self.folder / "pairs").glob("*.json") if path.stem.isdigit())
        return [record for record in map(self.record, lines) if record is not None]

    def features(self, line: int) -> dict[str, Tensor]:
        """Features of a pair's pictures by name, each ``[D]``; ``{}`` if there are none."""
        path = self._path(line).with_suffix(".safetensors")
        return load_file(path) if path.is_file() else {}

    def write(self, record: Mapping[str, Any], features: Mapping[str, Tensor]) -> None:
        """Keep a pair's record; it counts as run from then on, so it is the last file to be written."""
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
        (self.folder / f"images/{line:06d}").mkdir(parents=True, exist_ok=True)
        self.write_bytes(f"images/{line:06d}/{name}.jpg", buffer.getvalue())

    def image(self, line: int, name: str) -> Image.Image | None:
        """A picture that was kept; ``None``, and a warning, if its file is damaged."""
        path = self.folder / f"images/{line:06d}/{name}.jpg"
        if not path.is_file():
            return None
        try:
            return read_picture(path)
        except PictureError as error:  # one picture less, not a report less
            logger.warning("%s; it is left out: delete the pair's record and run again to make it anew", error)
            return None

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the folder whole or not at all."""
        return self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file of the folder whole or not at all."""
        path = self.folder / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _path(self, line: int) -> Path:
        return self.folder / f"pairs/{line:06d}.json"


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
