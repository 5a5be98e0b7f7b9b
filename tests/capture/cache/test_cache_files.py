"""Cache files on bad disks, in bad folders and with bad bytes: the model is captured, and one warning says why."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fisedit_compiler.capture import cache
from fisedit_compiler.capture.cache import store
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.graph.signatures import CallSignature

SIGNATURE = CallSignature((), (), "cpu", "")
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in a process that warned about nothing yet."""
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def path_of(name: str = "model") -> Path:
    path = cache.entry_path(name, SIGNATURE, 2)
    assert path is not None
    return path


def a_capture(constants: int = 4) -> CapturedGraph:
    """A graph of one constant, the smallest thing that is kept."""
    graph = fx.Graph()
    graph.output((graph.get_attr("constant_c"),))
    treespec = torch.utils._pytree.tree_flatten((0,))[1]
    return CapturedGraph(graph, SIGNATURE, 2, {"constant_c": torch.arange(float(constants))}, treespec)


def kept(folder: Path) -> Path:
    cache.save(path_of(), a_capture())
    (entry,) = folder.iterdir()
    assert cache.load(entry, SIGNATURE) is not None
    return entry


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_works_without(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """Two programs are looked for and kept, as a process does: nothing is found, nothing raises, one warning."""
    for name in ("model", "model", "another"):
        path = cache.entry_path(name, SIGNATURE, 2)
        if path is not None:
            assert cache.load(path, SIGNATURE) is None
            cache.save(path, a_capture())
    (message,) = warnings_in(caplog)
    assert words in message and "FISEDIT_CACHE_DIR" in message


def test_an_entry_is_read_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = cache.load(kept(folder), SIGNATURE)
    assert loaded is not None and torch.equal(loaded.constants["constant_c"], torch.arange(4.0))
    assert not warnings_in(caplog)
    assert cache.load(path_of("unknown"), SIGNATURE) is None and not warnings_in(caplog)


def test_every_flipped_bit_is_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = kept(folder)
    content = entry.read_bytes()
    places = sorted({*range(0, len(content), max(len(content) // 34, 1)), 0, 20, len(content) - 1})
    assert len(places) >= 34
    for number, place in enumerate(places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        entry.write_bytes(flipped)
        caplog.clear()
        assert cache.load(entry, SIGNATURE) is None
        assert len(warnings_in(caplog)) == 1


def test_every_truncation_is_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.save(path_of(), a_capture(constants=8192))
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    assert len(content) > 8 * 4096
    for end in range(0, len(content), 4096):
        entry.write_bytes(content[:end])
        caplog.clear()
        assert cache.load(entry, SIGNATURE) is None
        assert len(warnings_in(caplog)) == 1
    entry.write_bytes(content + b"\0")
    assert cache.load(entry, SIGNATURE) is None


def raising(number: int) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EDQUOT),
        ("replace", errno.EIO),
        ("mkdir", errno.EROFS),
        ("open", errno.EACCES),
        ("stat", errno.EACCES),
    ],
)
def test_a_disk_that_fails_is_left_alone(
    function: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.os, function, raising(number))
        assert_works_without(caplog, os.strerror(number))
    assert not folder.exists() or list(folder.iterdir()) == [], "no litter"


def test_a_full_disk_keeps_the_entry_that_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = kept(folder)
    content = entry.read_bytes()
    monkeypatch.setattr(store.os, "fsync", raising(errno.ENOSPC))
    cache.save(entry, a_capture(constants=99))
    assert entry.read_bytes() == content and list(folder.iterdir()) == [entry]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_ctrl_c_while_writing_leaves_no_litter(function: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    folder.mkdir(mode=0o700)
    monkeypatch.setattr(store.os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path_of(), a_capture())
    assert list(folder.iterdir()) == []


def test_file_and_folder_are_synced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(store.os, "fsync", lambda handle: (steps.append("sync"), sync(handle)))
    monkeypatch.setattr(store.os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    kept(folder)
    assert steps == (["sync", "rename", "sync"] if os.name == "posix" else ["sync", "rename"])


def test_stale_temporary_files_are_removed_and_others_stay(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    old, new, foreign = folder / "fisedit-old.tmp", folder / "fisedit-new.tmp", folder / "notes.tmp"
    for file in (old, new, foreign):
        file.write_bytes(b"")
    for file in (old, foreign):
        os.utime(file, (time.time() - 2 * store.STALE_SECONDS,) * 2)
    cache.save(path_of(), a_capture())
    assert not old.exists() and new.exists() and foreign.exists()


def test_a_folder_that_is_a_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("in the way")
    assert_works_without(caplog, "cannot be used")


def test_a_name_that_is_too_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", f"{tempfile.gettempdir()}/{'x' * 300}")
    assert_works_without(caplog, "too long")


@posix
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def unknown(user: int) -> Any:
        raise KeyError(user)

    for variable in ("FISEDIT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cache.entry_path("model", SIGNATURE, 2) is None
    assert_works_without(caplog, "home directory")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/fisedit_compiler"), "a home is only asked for if need be"


def test_sources_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cache, "_source_digest", raising(errno.EACCES))
    assert_works_without(caplog, "not kept")


@posix
def test_what_is_written_is_private(folder: Path) -> None:
    previous = os.umask(0)
    try:
        entry = kept(folder)
    finally:
        os.umask(previous)
    assert entry.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_write_to_is_not_used(mode: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(folder)
    folder.chmod(mode)
    assert_works_without(caplog, "chmod go-w")


@posix
def test_a_file_that_others_write_to_is_not_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = kept(folder)
    entry.chmod(0o620)
    assert cache.load(entry, SIGNATURE) is None
    assert len(warnings_in(caplog)) == 1 and "chmod go-w" in warnings_in(caplog)[0]


@posix
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_read(
    which: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = kept(folder)
    if os.geteuid() == 0:
        os.chown(folder if which == "folder" else entry, 12345, -1)
    else:
        monkeypatch.setattr(store.os, "geteuid", lambda: 12345)
    assert cache.load(entry, SIGNATURE) is None
    assert len(warnings_in(caplog)) == 1 and "another user" in warnings_in(caplog)[0]


@posix
def test_a_pipe_or_a_folder_in_place_of_an_entry_does_not_block(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(mode=0o700)
    os.mkfifo(path_of(), 0o600)
    path_of("folder").mkdir(mode=0o700)
    assert cache.load(path_of(), SIGNATURE) is None
    assert cache.load(path_of("folder"), SIGNATURE) is None
    assert len(warnings_in(caplog)) == 1


def test_a_file_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = kept(folder)
    monkeypatch.setattr(store, "LARGEST_ENTRY", 10)
    assert cache.load(entry, SIGNATURE) is None
