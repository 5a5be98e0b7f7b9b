"""The table of planted bugs fits the code: what it replaces is there, and its tests exist."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutation.planted import BUGS, Bug
from tests.mutation.run import REPOSITORY, planted

ROOMS = ("graph", "passes", "masks", "capture/cache", "capture/keys", "recordings", "runtime", "slots")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}: {bug.harm}")
def test_it_can_be_planted(bug: Bug) -> None:
    text = (REPOSITORY / "fisedit_compiler" / bug.file).read_text()
    ast.parse(planted(text, bug))
    files = [test for test in bug.tests if test.startswith("tests/")]
    assert files and all((REPOSITORY / file).is_file() for file in files)


def test_every_room_that_decides_about_pictures_has_some() -> None:
    rooms = Counter(room for bug in BUGS for room in ROOMS if bug.file.startswith(f"{room}/"))
    assert all(rooms[room] >= 5 for room in ROOMS), rooms
    assert len(BUGS) >= 60
