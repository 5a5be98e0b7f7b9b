"""The fit of the break-even figures: where the interpolation crosses, what is read, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import break_even, step_latency
from benchmarks.break_even import PACKAGE_FILE, crossing, fit, measurements

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.5), (1.0, 1.5)], 0.75),
        ([(1.0, 1.5), (0.5, 0.5)], 0.75),
        ([(0.2, 0.4), (0.6, 1.0), (1.0, 2.0)], 0.6),
        ([(0.2, 0.4), (0.5, 1.2), (0.6, 0.9), (1.0, 2.0)], 0.2 + 0.3 * 0.75),
        ([(0.1, 1.2), (1.0, 3.0)], 0.1),
        ([(0.5, 0.5), (1.0, 0.9)], 1.0),
        ([(0.05, 0.3), (0.3, 0.7)], None),
        ([], None),
    ],
)
def test_where_sparse_calls_stop_paying(points: list[tuple[float, float]], expected: float | None) -> None:
    assert crossing(points) == (None if expected is None else pytest.approx(expected))


def report(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {
        "benchmark": "step_latency",
        "settings": {"model": "tiny", **settings},
        "machine": {"device": "cpu", "cpu": "a processor"},
        "versions": {"torch": "9.9"},
        "rows": rows,
    }


def row(area: float, dense: float, sparse: float, **more: Any) -> dict[str, Any]:
    return {"mask_fraction": area, "dense_ms": dense, "sparse_ms": sparse, **more}


def test_rows_that_fell_back_are_left_out() -> None:
    rows = [row(0.5, 10.0, 5.0, kind="sparse"), row(1.0, 10.0, 10.1, kind="dense")]
    (measured,) = measurements("a.json", report(rows))
    assert measured.points == ((0.5, 0.5),)
    assert (measured.device, measured.backend) == ("cpu", "eager")
    assert measured.source == {"file": "a.json", "model": "tiny", "machine": "a processor", "torch": "9.9"}


def test_dense_calls_are_those_that_an_edit_falls_back_to() -> None:
    rows = [row(0.5, 0.0, 5.0, baseline=name, baseline_ms=time) for name, time in (("eager", 10.0), ("compiled", 8.0))]
    (embedded,) = measurements("a.json", report(rows))
    (full_size,) = measurements("a.json", report(rows, models=["sd21"]))
    assert (embedded.points, full_size.points) == (((0.5, 0.5),), ((0.5, 5.0 / 8.0),))


def test_other_benchmarks_are_left_out() -> None:
    assert measurements("b.json", {"benchmark": "compile_time"}) == []


def test_several_models_give_their_median_and_other_pairs_stay() -> None:
    kept = {"device": "cuda", "backend": "inductor", "break_even": 0.5, "sources": []}
    known = {"figures": [kept, {"device": "cpu", "backend": "eager", "break_even": 0.9, "sources": []}]}
    reports = [report([row(0.5, 10.0, 5.0), row(1.0, 10.0, slowest)]) for slowest in (15.0, 10.0, 11.0)]
    measured = [one for number, found in enumerate(reports) for one in measurements(f"{number}.json", found)]
    cpu, cuda = fit(measured, known)["figures"]
    assert cuda == kept
    assert (cpu["device"], cpu["backend"], cpu["break_even"]) == ("cpu", "eager", 0.917)
    assert [source["break_even"] for source in cpu["sources"]] == [0.75, 1.0, 0.917]


def test_the_packages_figures_are_those_of_the_committed_reports() -> None:
    packaged = json.loads(PACKAGE_FILE.read_text(encoding="utf-8"))
    for entry in packaged["figures"]:
        for source in entry["sources"]:
            path = RESULTS / source["file"]
            measured = measurements(path.name, json.loads(path.read_text(encoding="utf-8")))
            (points,) = (one.points for one in measured if one.source["model"] == source["model"])
            assert crossing(points) == pytest.approx(source["break_even"], abs=1e-3)


def test_from_a_measurement_to_the_file(tmp_path: Path) -> None:
    """Full circle on a small map, where times are noise but rows are rows."""
    rows, output = tmp_path / "rows.json", tmp_path / "break_even.json"
    size = ["--height", "32", "--width", "32", "--repeats", "2", "--warmup", "1", "--baselines", "eager"]
    step_latency.main(["--fractions", "0.06", "1.0", "--dense-above", "1", *size, "--json", str(rows)])
    written = json.loads(rows.read_text())
    assert [found["kind"] for found in written["rows"]] == ["sparse", "sparse"]
    assert written["settings"]["backend"] == "eager"
    contents = break_even.main([str(rows), "--output", str(output)])
    assert json.loads(output.read_text()) == contents
    entry = next(entry for entry in contents["figures"] if entry["device"] == "cpu")
    assert entry["sources"][0]["file"] == "rows.json"


def test_reports_that_end_too_early_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps(report([row(0.05, 10.0, 2.0)])))
    with pytest.raises(SystemExit, match="--dense-above 1 up to 100 %"):
        break_even.main([str(path), "--output", str(tmp_path / "unused.json")])
    assert not (tmp_path / "unused.json").exists()
