"""What tests of modes share: a call's input, and how a call that is not the run's is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisedit_compiler.errors import ModeError

SAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
REFUSED = "this call is not made from there"


def refused(call: Callable[[], Any], message: str = REFUSED) -> None:
    with pytest.raises(ModeError, match=message):
        call()
