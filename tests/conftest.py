"""What every test shares: threads, hypothesis profiles, the ``gpu`` marker. No fixtures of one subject."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples that run a network take as long as the machine is slow: a deadline would only make the tests flaky.
settings.register_profile("default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=25,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests off the network and the user's cache, and share the cores under pytest-xdist."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    # Captures are shared between tests, but not with what the user of this machine keeps.
    os.environ.setdefault("FISEDIT_CACHE_DIR", str(config.rootpath / ".fisedit-cache"))
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` on a machine without CUDA."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_modules_are_left_alone() -> Iterator[None]:
    """A compiled module that tests share is after each of them as it was, so that any order of tests will do."""
    yield
    if (zoo := sys.modules.get("tests.support.compiled_zoo")) is not None:
        zoo.forget_cut_steps()
        zoo.check_shared_modules()
