"""What the JSON files of an evaluation's folder must hold to be used: they may be damaged, or written by hand."""

from __future__ import annotations

from typing import Any

_CONFIG: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "clip": str,
    "features": str,
    "methods": list,
    "steps": int,
    "guidance": (int, float),
    "dtype": str,
    "backend": str,
}
_FACTS: dict[str, type] = {
    "command": str,
    "pairs_command": str,
    "pairs": int,
    "shards": int,
    "machine": dict,
    "versions": dict,
    "rejected": list,
}
_WORDS = ("note", "skipped")
_FIGURES = ("directional_similarity", "image_similarity")
"""What every method that ran has."""


def check_config(found: Any) -> dict[str, Any]:
    """The contents of ``config.json`` as they are.

    Raises:
        ValueError: a field is missing or of another type.
    """
    if not isinstance(found, dict):
        raise ValueError("it is damaged")
    wrong = [name for name, kind in _CONFIG.items() if not isinstance(found.get(name), kind)]
    if wrong or not all(isinstance(name, str) for name in found["methods"]):
        raise ValueError(f"it is damaged at {', '.join(wrong) or 'methods'}")
    return found


def sound_facts(found: Any) -> dict[str, Any]:
    """The contents of ``run.json`` without what is of another type than it should be."""
    if not isinstance(found, dict):
        return {}
    facts = {name: found[name] for name, kind in _FACTS.items() if isinstance(found.get(name), kind)}
    if "rejected" in facts:
        facts["rejected"] = [line for line in facts["rejected"] if isinstance(line, str)]
    return facts


def is_sound(found: Any, line: int) -> bool:
    """Whether this is the record of the pair in ``line`` with everything a report reads."""
    if not isinstance(found, dict) or found.get("line") != line or not isinstance(found.get("pair"), dict):
        return False
    pair = found["pair"]
    if found.get("status") == "failed":
        return isinstance(found.get("error"), str) and isinstance(pair.get("output"), str)
    if found.get("status") != "done" or not _has_words(pair, "input", "edit", "output"):
        return False
    if not isinstance(pair.get("kind", ""), str) or "everywhere" not in found:
        return False
    truth, methods = found.get("truth"), found.get("methods")
    if not (truth is None or (isinstance(truth, dict) and isinstance(truth.get("source"), str))):
        return False
    return isinstance(methods, dict) and all(_is_sound_method(figures) for figures in methods.values())


def _has_words(found: dict[str, Any], *names: str) -> bool:
    return all(isinstance(found.get(name), str) for name in names)


def _is_sound_method(figures: Any) -> bool:
    if not isinstance(figures, dict):
        return False
    if "skipped" in figures:
        return isinstance(figures["skipped"], str)
    if not all(_is_number(figures.get(name)) for name in _FIGURES):
        return False
    return all(name in _WORDS or value is None or _is_number(value) for name, value in figures.items())


def _is_number(value: Any) -> bool:
    # A whole number of a JSON file may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (value != value or abs(value) <= 1e300)
