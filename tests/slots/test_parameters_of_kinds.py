"""Parameters of kinds of slots: what equality does not see is refused, or others would share a slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.extend import register_slot_kind
from fisedit_compiler.slots import registry
from fisedit_compiler.slots.asking import ANSWERS
from tests.slots.kinds_from_outside import Sound, broken, refusal_of


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    yield


@pytest.mark.parametrize("name", ["__init__", "__new__", "__eq__", "__hash__"])
def test_parameters_of_a_plain_class_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'tests\.broken'.*{name}.*@dataclass\(frozen=True\)"):
        broken({name: lambda self, *arguments: None})


def test_parameters_of_a_class_above_are_refused() -> None:
    above = type("Above", (Sound,), {"__init__": lambda self, bits: setattr(self, "bits", bits)})
    with pytest.raises(ConfigError, match=r"'tests\.broken'.*Above defines __init__.*frozen=True"):
        broken({}, above)


def test_a_dataclass_without_equality_is_refused() -> None:
    @dataclass(frozen=True, eq=False)
    class NotEqual(Sound):
        name = "tests.broken"
        bits: int = 8

    with pytest.raises(ConfigError, match=r"'tests\.broken'.*eq=False"):
        register_slot_kind(NotEqual)


def test_a_parameter_that_equality_ignores_is_refused() -> None:
    @dataclass(frozen=True)
    class Ignoring(Sound):
        name = "tests.broken"
        bits: int = field(default=8, compare=False)

    with pytest.raises(ConfigError, match=r"'tests\.broken' has field bits.*equality does not see"):
        register_slot_kind(Ignoring)


def test_a_parameter_that_is_set_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = broken({})()
    kind.__dict__["bits"] = 8
    refusal = refusal_of(kind, monkeypatch)
    assert isinstance(refusal, ConfigError) and "keeps bits" in str(refusal)


@pytest.mark.parametrize("value", [[1], {}, torch.ones(2)])
def test_a_parameter_that_cannot_be_compared_is_refused(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @register_slot_kind
    @dataclass(frozen=True)
    class Listed(Sound):
        name = "tests.broken"
        bits: Any = None

    refusal = refusal_of(Listed(value), monkeypatch)
    assert isinstance(refusal, ConfigError) and "'tests.broken'" in str(refusal)


@pytest.mark.parametrize("method", sorted(ANSWERS))
def test_a_method_that_is_none_is_refused_at_once(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"'tests\.broken': {method} is None"):
        broken({method: None})


@pytest.mark.parametrize("rounding", [None, "small", 1 + 2j])
def test_a_rounding_that_is_no_share_is_refused(rounding: Any) -> None:
    with pytest.raises(ConfigError, match="rounding a share from 0 to 1"):
        broken({"rounding": rounding})
