"""The current stream as torch tells it, from whatever thread and inside whatever block it is asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from fisedit_compiler.tensors.streams import current_stream


@pytest.mark.gpu
def test_it_is_torchs() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    found: list[bool] = []

    def ask() -> None:
        for _ in range(2):
            found.append(current_stream(device) == torch.cuda.current_stream(device))
            with torch.cuda.stream(torch.cuda.Stream(device)):
                found.append(current_stream(device) == torch.cuda.current_stream(device))
                found.append(current_stream(torch.device("cuda")) == torch.cuda.current_stream())

    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(found) == 12 and all(found)
