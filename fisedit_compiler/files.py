"""Files that are written whole or not at all, and stay after a crash of the process or of the machine."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

TEMPORARY = "fisedit-*.tmp"
"""Pattern of the names of temporary files; one that is hours old was left by a process that was killed."""


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file under another name beside it, sync it, and rename it. Nothing is left behind if that fails.

    Args:
        path: the file; its folder must be there.
        content: of the file.
        mode: permissions, less the umask.

    Raises:
        OSError: it cannot be written. A file that was there is as before.
    """
    temporary = path.with_name(f"fisedit-{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too leaves nothing behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last. Not every system can; contents are synced before in any case."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
