"""Whose code is known by its package's version, and whose is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fisedit_compiler.capture.keys import code


@pytest.fixture
def _forgotten() -> None:
    for cached in (code.is_installed, code.package_version):
        cached.cache_clear()


def write_package(site: Path, name: str, *, record: bool, beside: Path | None = None) -> None:
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("")
    about = (beside or site) / f"{name}-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    if record:
        (about / "RECORD").write_text(f"{name}/__init__.py,,\n")


@pytest.mark.usefixtures("_forgotten")
def test_a_wheel_is_known_by_its_version_wherever_it_was_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pip install --target``, a site of the user's or of a distribution."""
    write_package(tmp_path, "put_elsewhere", record=True)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("put_elsewhere")
    assert code.is_installed("put_elsewhere.inner") and code.package_version("put_elsewhere") == "1.2"


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("case", ["sources with a description of their own", "installed to be edited"])
def test_code_that_may_be_edited_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name = case.replace(" ", "_")
    installed = case == "installed to be edited"
    write_package(tmp_path / "sources", name, record=installed, beside=tmp_path / "site" if installed else None)
    for path in ("site", "sources"):
        monkeypatch.syspath_prepend(tmp_path / path)
    __import__(name)
    assert not code.is_installed(name)


def test_torch_and_python_are_installed_and_tests_are_not() -> None:
    assert code.is_installed("torch.nn") and code.is_installed("json") and not code.is_installed(__name__)
