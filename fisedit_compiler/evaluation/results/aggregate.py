"""From the records of pairs to ``results.json``: figures per method and group of pairs, distances of sets, checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fisedit_compiler.evaluation.measures.features import frechet_distance
from fisedit_compiler.evaluation.measures.measure import METRICS
from fisedit_compiler.evaluation.measures.requirements import requirements
from fisedit_compiler.evaluation.measures.reuse_gate import reuse_requirements
from fisedit_compiler.evaluation.measures.statistics import summarise
from fisedit_compiler.evaluation.methods.registry import Method, choose_methods
from fisedit_compiler.evaluation.pairs.pairs import KINDS, LOCAL_KINDS, SCENE_KINDS
from fisedit_compiler.evaluation.results.store import Store

FORMAT = 1

GROUPS = ("all", "local", "scene-wide", *KINDS)
"""Groups of pairs that figures are given for: all, those changing one object, those changing everything, kinds."""


def aggregate(store: Store) -> dict[str, Any]:
    """The results of what is in the folder so far, as plain values.

    Raises:
        FiseditError: the folder holds no evaluation.
    """
    config = store.config
    methods = choose_methods(config["methods"])
    records = store.records()
    done = [record for record in records if record["status"] == "done"]
    features = comparable({record["line"]: store.features(record["line"]) for record in done})
    run = store.run_facts
    return {
        "format": FORMAT,
        "configuration": config,
        "run": run,
        "counts": {
            "done": len(done),
            "failed": len(records) - len(done),
            "rejected": len(run.get("rejected", ())),
            "wanted": run.get("pairs"),
            **{group: len(_in_group(done, group)) for group in GROUPS},
        },
        "methods": [_of_method(method, done, features) for method in methods],
        "checks": [requirement.to_dict() for requirement in (*requirements(done), *reuse_requirements(done))],
        "failed": [
            {"line": record["line"], "pair": record["pair"], "error": record["error"]}
            for record in records
            if record["status"] != "done"
        ],
    }


def comparable(features: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The same without what distances cannot be taken of: numbers that are none, and another length than most."""
    lengths = Counter(len(item["base"]) for item in features.values() if "base" in item)
    length = lengths.most_common(1)[0][0] if lengths else 0
    return {
        line: item if all(len(value) == length and bool(value.isfinite().all()) for value in item.values()) else {}
        for line, item in features.items()
    }


def _of_method(method: Method, records: Sequence[dict[str, Any]], features: dict[int, dict[str, Tensor]]) -> Any:
    return {
        "name": method.name,
        "title": method.title,
        "family": method.family,
        "parameter": method.parameter,
        "skipped": _reasons(method.name, records),
        "groups": {
            group: _figures(method.name, members, features)
            for group in GROUPS
            if (members := _in_group(records, group))
        },
    }


def _figures(name: str, records: Sequence[dict[str, Any]], features: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """Summaries by metric over the pairs the method ran for, and the distances of its pictures as a set."""
    ran = [record for record in records if "skipped" not in record["methods"].get(name, {"skipped": ""})]
    found: dict[str, Any] = {"pairs": len(ran)}
    for metric in METRICS:
        summary = summarise([record["methods"][name].get(metric.name) for record in ran])
        if summary is not None:
            found[metric.name] = summary.to_dict()
    kept = [features[record["line"]] for record in ran if name in features[record["line"]]]
    edited = [item[name] for item in kept]
    found["fid_to_base"] = frechet_distance([item["base"] for item in kept], edited)
    found["fid_to_dense"] = frechet_distance([item["dense"] for item in kept if "dense" in item], edited)
    found["fid_features"] = len(edited[0]) if edited else None
    return found


def _reasons(name: str, records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How often a method had nothing to do, by reason."""
    counts: dict[str, int] = {}
    for record in records:
        reason = record["methods"].get(name, {}).get("skipped")
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def _in_group(records: Sequence[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    kinds = {"local": LOCAL_KINDS, "scene-wide": SCENE_KINDS}.get(group, (group,))
    return [record for record in records if group == "all" or record["pair"].get("kind") in kinds]
