"""Captured graphs on disk, so that the next process does not capture the same model again.

Capture is the slow part (ten to thirty seconds; rewriting takes one), so what is kept is the captured and simplified
graph as JSON inside a safetensors file, with the few constant tensors it closes over. The key covers model structure,
call signature, library versions and the compiler's own source.

Reading an entry evaluates nothing: sizes go through a parser of four symbols and arithmetic (``sizes.py``), operations
through an allow-list (``targets.py``), the graph through a check of every field (``graphs.py``). Files are private to
their owner, written whole or not at all, and carry a digest (``store.py``). Whatever is wrong with a file or the
folder, the model is captured as if there were no cache, and a warning says so once.

Nothing here captures or rewrites a graph. May import what the room ``capture`` may.

``FISEDIT_CACHE_DIR`` selects the folder; the default is ``fisedit_compiler`` where the platform keeps caches of a user
(``XDG_CACHE_HOME`` or ``~/.cache`` on Linux).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from functools import cache
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from fisedit_compiler.capture.cache import graphs, store
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.graph.signatures import CallSignature

logger = logging.getLogger(__name__)
FORMAT = 2
"""Of the JSON document. Part of the key and of the document: an entry of another format is not read."""


def directory() -> Path:
    """The folder of cache entries (not created here).

    Raises:
        RuntimeError: no folder is named and the user has no home directory.
    """
    if chosen := os.environ.get("FISEDIT_CACHE_DIR"):
        return Path(chosen)
    folder = user_cache_path("fisedit_compiler", appauthor=False)
    if not folder.is_absolute():  # older versions of platformdirs leave a "~" that they cannot resolve
        raise RuntimeError("the user has no home directory")
    return folder


def entry_path(structure: str, signature: CallSignature, multiple: int | None) -> Path | None:
    """Where the capture of a module structure and call signature is kept; ``None`` if there is no place for it."""
    try:
        folder = directory()
        versions = (FORMAT, torch.__version__, _version("diffusers"), platform.python_version(), _source_digest())
    except (OSError, RuntimeError) as error:
        store.warn_once("no folder", f"captures are not kept on disk ({error}); name a folder in FISEDIT_CACHE_DIR")
        return None
    text = repr((structure, signature, multiple, versions))
    return folder / f"{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}{store.SUFFIX}"


def load(path: Path, signature: CallSignature) -> CapturedGraph | None:
    """A captured graph from disk, or ``None`` if there is none or it cannot be read."""
    content = store.read(path)
    if content is None:
        return None
    try:
        tensors = read_tensors(content)
        captured = graphs.decode(_document(content), signature, tensors)
    except Exception as error:  # anything may stand in a file, and torch, fx and sympy raise what they like
        logger.warning("ignoring unreadable cache entry %s: %s", path.name, error or type(error).__name__)
        return None
    captured.constants = {name: tensor.to(signature.device) for name, tensor in tensors.items()}
    return captured


def save(path: Path, captured: CapturedGraph) -> None:
    """Keep a captured graph; a graph or a disk that does not allow it is logged and left alone."""
    try:
        document = json.dumps(graphs.encode(captured) | {"format": FORMAT})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in captured.constants.items()}
        content = write_tensors(tensors, metadata={"graph": document})
    except Exception as error:  # tensor subclasses and shared memory fail in as many ways; the capture itself is fine
        logger.info("capture is not kept on disk: %s", error or type(error).__name__)
        return
    store.write(path, content)


def _document(content: bytes) -> object:
    """The JSON document in the header of a safetensors file (an 8 byte length, then JSON)."""
    length = int.from_bytes(content[:8], "little")
    document = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["graph"])
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise graphs.UnreadableError(f"it is not of format {FORMAT}")
    return document


# What an entry depends on; the passes run again at every start.
_SOURCES = ("capture/cache/*.py", "capture/*.py", "graph/*.py", "passes/simplify.py")


@cache
def _source_digest() -> str:
    root = Path(__file__).parents[2]
    files = [file for pattern in _SOURCES for file in sorted(root.glob(pattern))]
    if not files:
        raise OSError(f"the sources of fisedit_compiler are not in {root}")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
