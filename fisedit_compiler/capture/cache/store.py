"""Files of a folder that only its owner writes to: read after checking, written whole or not at all.

An entry is a line that names its kind, a line with the SHA-256 of the rest, and the rest. The digest finds damage, not
malice: against that the folder and the file must belong to the user (or to root) and be writable by nobody else, as ssh
demands of keys, and the rest is read without evaluating anything.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import time
from pathlib import Path

from fisedit_compiler.files import TEMPORARY, write_whole

logger = logging.getLogger(__name__)
KEPT_ENTRIES = 64
LARGEST_ENTRY = 256 * 2**20
"""In bytes. SDXL's takes 3 MB; a larger file is none of ours and not worth the memory."""
STALE_SECONDS = 3600
"""Age from which a temporary file was left by a process that was killed."""
SUFFIX = ".capture"
_MAGIC = b"fisedit capture\n"
_ENTRY = re.compile(r"[0-9a-f]{64}\.(capture|safetensors)")
"""Names of entries, those of earlier versions too: nothing else in the folder is ever deleted."""
_warned: set[str] = set()


def warn_once(subject: str, message: str) -> None:
    """Warn about ``subject``, unless this process did before."""
    if subject not in _warned:
        _warned.add(subject)
        logger.warning("%s", message)


def read(path: Path) -> bytes | None:
    """What :func:`write` kept; ``None`` if it is not there, or (with a warning) not to be trusted."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno != errno.ENOENT:
            _refuse(path.parent, error)
        return None
    except ValueError as error:  # a NUL in the name
        _refuse(path.parent, error)
        return None
    try:
        with open(handle, "rb") as file:
            _check_private(path.parent, os.stat(path.parent))
            found = os.fstat(file.fileno())
            _check_private(path, found)
            if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_ENTRY:
                raise PermissionError(f"{path} is no file of this cache")
            content = file.read(LARGEST_ENTRY + 1)
    except OSError as error:
        _refuse(path.parent, error)
        return None
    head = len(_MAGIC) + 65
    payload = content[head:]
    if content[:head] != _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        logger.warning("ignoring unreadable cache entry %s: it is damaged, or of another version", path.name)
        return None
    return payload


def write(path: Path, payload: bytes) -> None:
    """Keep ``payload``: after a crash, of this process or of the machine, the file is whole or not there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path.parent, os.stat(path.parent))
        write_whole(path, _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload, mode=0o600)
        _prune(path.parent)
    except (OSError, ValueError) as error:
        _refuse(path.parent, error)


def _check_private(path: Path, found: os.stat_result) -> None:
    """Raise ``PermissionError`` if somebody else could have written what is there.

    Root may own it: in a container the user often is root, or root made the folder for them.
    """
    if os.name != "posix":
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others; chmod go-w {path}")


def _refuse(folder: Path, error: Exception) -> None:
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    warn_once(
        str(folder),
        f"the cache of captures in {str(folder)!r} cannot be used ({reason}), so models are captured again in every "
        "process; mend the folder, name another one in FISEDIT_CACHE_DIR, or pass SparsifyConfig(cache=False)",
    )


def _prune(folder: Path) -> None:
    """Delete all but the newest entries, and temporary files that nobody is writing any more."""
    ages: list[tuple[float, Path]] = []
    now = time.time()
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            if _ENTRY.fullmatch(file.name):
                ages.append((file.stat().st_mtime, file))
            elif file.match(TEMPORARY) and now - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
    for _, file in sorted(ages, reverse=True)[KEPT_ENTRIES:]:
        file.unlink(missing_ok=True)
