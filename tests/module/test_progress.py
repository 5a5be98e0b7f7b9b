"""What is said while compiling: in the log always, as a bar on stderr where one is seen and wanted, never on stdout."""

from __future__ import annotations

import io
import logging
import re
import time
from contextlib import redirect_stderr
from typing import Any

import pytest
from diffusers.utils import logging as diffusers_logging

from fisedit_compiler import Editor, SparsifyConfig, progress, sparsify
from fisedit_compiler.progress import STAGES, compiling, shown
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.zoo import ZOO


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(progress, "DELAY", 0.02)
    return Terminal()


def slow_stage(stderr: Any) -> None:
    # pytest puts its own stderr in place after the fixtures.
    with redirect_stderr(stderr), compiling("Inductor"):
        time.sleep(0.4)


def test_a_bar_shows_stage_and_seconds_and_goes_away(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    slow_stage(terminal)
    text = terminal.getvalue()
    assert re.search(r"compiling for sparse calls, 3/4 Inductor \|.+\| 00:00", text)
    assert text.endswith("\r") and text.rstrip("\r").rsplit("\r", 1)[-1].strip() == "", "the line is empty again"
    assert capsys.readouterr().out == ""


def test_a_stage_that_is_over_at_once_shows_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 60)
    with redirect_stderr(terminal), compiling("rewrite"):
        pass
    assert terminal.getvalue() == ""


def test_bars_that_are_switched_off_stay_off(terminal: Terminal) -> None:
    with shown(False):
        slow_stage(terminal)
        with shown(True):
            slow_stage(terminal)
    diffusers_logging.disable_progress_bar()
    try:
        slow_stage(terminal)
    finally:
        diffusers_logging.enable_progress_bar()
    level = logging.getLogger("fisedit_compiler").level
    logging.getLogger("fisedit_compiler").setLevel(logging.ERROR)
    try:
        slow_stage(terminal)
    finally:
        logging.getLogger("fisedit_compiler").setLevel(level)
    assert terminal.getvalue() == ""
    slow_stage(terminal)
    assert terminal.getvalue() != "", "and go on again"


@pytest.mark.parametrize("stream", ["none", "closed", "file"])
def test_without_a_terminal_nothing_is_shown(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    if stream == "closed":
        file.close()
    monkeypatch.setattr(progress, "DELAY", 0.02)
    slow_stage(None if stream == "none" else file)
    assert file.closed or file.getvalue() == ""


def test_an_error_ends_the_bar_and_goes_on(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), redirect_stderr(terminal), compiling("CUDA graph"):
        time.sleep(0.4)
        raise KeyboardInterrupt
    before = terminal.getvalue()
    time.sleep(0.1)
    assert "CUDA graph" in before and terminal.getvalue() == before


def test_the_log_tells_each_stage_and_its_seconds(caplog: pytest.LogCaptureFixture) -> None:
    model = ZOO["plain_conv"]()
    config = SparsifyConfig(multiple=model.multiple, cache=False)
    with caplog.at_level(logging.INFO, "fisedit_compiler.progress"):
        sparsify(model.module, config, example_inputs=model.make_inputs(1, 8, 8))
    stages = [f"compiling for sparse calls, {number}/2 {stage}: " for number, stage in enumerate(STAGES[:2], 1)]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] + ": " for line in said] == [stage for stage in stages for _ in range(2)]
    assert all(re.search(r"done after \d+\.\d s$", line) for line in said[1::2])


def test_an_editors_setting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[bool] = []
    monkeypatch.setattr(progress, "_is_terminal", lambda: wanted.append(progress._wanted.get()))
    for setting in (True, False):
        with Editor(make_tiny_pipeline(), progress=setting) as editor:
            editor.prepare()
    assert wanted and all(wanted), "with progress=False nobody asks for a terminal"
    assert progress._wanted.get()
