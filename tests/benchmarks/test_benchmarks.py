"""The benchmarks measure what they say, and write JSON that can be compared between machines."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import (
    compile_time,
    decoding,
    dense_calls,
    model_key,
    multi_turn,
    norms,
    product_parts,
    reuse,
    step_latency,
    wrapper_overhead,
)
from benchmarks.support import dense_forms, peers
from benchmarks.support.harness import Report, Stopwatch, Timing, alternate, argument_parser, machine, prepare, versions
from benchmarks.support.peers import Peer
from benchmarks.support.subjects import make_call, square_mask
from tests.support.zoo import ZOO

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_timing_reports_median_and_quartiles():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median_ms == 3.0
    assert timing.iqr_ms == 2.0
    assert Timing((5.0,)).iqr_ms == 0.0
    assert timing.as_dict("dense") == {"dense_ms": 3.0, "dense_iqr_ms": 2.0}


def test_sides_are_run_in_turn_and_warm_up_is_not_timed():
    order: list[str] = []

    def side(name: str):
        def run(stopwatch: Stopwatch) -> None:
            stopwatch.time(name, lambda: order.append(name))

        return run

    stopwatch = alternate([side("a"), side("b")], repeats=3, warmup=1, device=CPU)
    assert order == ["a", "b"] * 4
    assert len(stopwatch["a"].samples_ms) == len(stopwatch["b"].samples_ms) == 3


@pytest.mark.parametrize("fraction", step_latency.FRACTIONS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 40)])
def test_mask_has_the_area_asked_for_and_is_one_compact_block(fraction, height, width):
    mask = square_mask(fraction, height, width)
    assert mask.float().mean().item() == pytest.approx(fraction, abs=0.02)
    rows, columns = mask.any(1).sum().item(), mask.any(0).sum().item()
    assert rows * columns == mask.sum().item()
    if fraction < 0.5:
        assert not torch.equal(mask, mask.flip(0))
        assert not torch.equal(mask, mask.flip(1))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_mask_of_an_impossible_area_is_refused(fraction):
    with pytest.raises(ValueError, match="at most 1"):
        square_mask(fraction, 8, 8)


@pytest.mark.parametrize("text", ["0", "-5", "101", "nan"])
def test_an_option_that_is_no_area_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no area"):
        step_latency.area(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json", "."], "is a folder"),
        (["--json", str(Path(__file__) / "x.json")], "cannot be written"),
        (["--device", "foo"], "no device"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(options, words):
    with pytest.raises(SystemExit, match=words):
        prepare(argument_parser("", repeats=1).parse_args(options))


def test_help_names_no_default_that_is_none():
    text = argument_parser("", repeats=7).format_help()
    assert "default: None" not in text and "timed repeats of everything (default: 7)" in text


def test_inputs_are_the_same_on_every_run():
    class Unet(torch.nn.Linear):
        config: ClassVar = {"in_channels": 4, "cross_attention_dim": 16}

    first, second = (make_call(Unet(1, 1), batch=2, height=8, width=8, tokens=5) for _ in range(2))
    assert torch.equal(first.sample, second.sample)
    assert first.edit_text.shape == (2, 5, 16)
    assert not torch.equal(first.base_text, first.edit_text)


def test_report_names_machine_and_versions_but_not_the_host(tmp_path):
    report = Report("empty", {}, machine(CPU), versions(), [])
    text = report.as_json()
    written = json.loads(text)
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["torch"] == torch.__version__
    assert os.uname().nodename not in text


def test_step_latency_writes_a_row_per_fraction_and_baseline(tmp_path):
    path = tmp_path / "rows.json"
    size = ["--height", "32", "--width", "32", "--repeats", "2", "--warmup", "1"]
    names = list(dense_forms.BASELINES[:2])
    step_latency.main(["--fractions", "0.06", "1.0", *size, "--baselines", *names, "--json", str(path)])
    written = json.loads(path.read_text())
    assert [row["mask_fraction"] for row in written["rows"]] == pytest.approx([0.06, 0.06, 1.0, 1.0], abs=0.02)
    kinds = ["sparse", "sparse", "dense", "dense"]
    assert [row["kind"] for row in written["rows"]] == kinds, "a full mask is above the break-even"
    assert [row["baseline"] for row in written["rows"]] == 2 * names
    for row in written["rows"]:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["sparse_ms"], rel=0.01)
        assert min(row["baseline_ms"], row["sparse_ms"], row["sparse_first_call_ms"]) > 0
        assert row["strongest"] == (row["baseline"] == written["settings"]["strongest"])
    assert {"cpu", "cores", "threads"} <= set(written["machine"])
    assert "diffusers" in written["versions"]


@pytest.fixture
def uncompiled(monkeypatch):
    """Nothing is compiled: which dense calls there are is asked here, not what Inductor makes of them."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    return asked


def test_step_latency_compares_with_every_dense_call_of_a_cpu(monkeypatch, uncompiled):
    unet = ZOO["sd15"]().module
    monkeypatch.setattr(step_latency, "load_unet", lambda *_: unet)
    report = step_latency.main(["--fractions", "0.1", "--height", "16", "--width", "16", "--repeats", "1"])
    assert [row["baseline"] for row in report.rows] == list(dense_forms.BASELINES)
    assert sum(row["strongest"] for row in report.rows) == 1
    assert set(report.settings["baseline_first_call_s"]) == set(dense_forms.BASELINES)
    assert uncompiled == 2 * [{"mode": None, "fullgraph": True}]


def test_step_latency_has_rows_of_peers_that_are_never_the_strongest(monkeypatch):
    unet = ZOO["sd15"]().module
    monkeypatch.setattr(step_latency, "load_unet", lambda *_: unet)
    # Any module that is there stands for an installed project.
    monkeypatch.setattr(peers, "PEERS", {"csv": lambda unet, run: Peer("csv", "a note", lambda *_, **__: [None], 2)})
    size = ["--height", "16", "--width", "24", "--repeats", "1"]
    report = step_latency.main(["--fractions", "0.1", *size, "--baselines", "eager", "--peers"])
    assert [(row["baseline"], row["strongest"]) for row in report.rows] == [("eager", True), ("csv", False)]
    assert report.settings["peers"] == {"csv": "a note"}


@pytest.mark.parametrize("name", dense_forms.BASELINES)
def test_a_dense_baseline_computes_what_the_unet_does(name, uncompiled):
    unet = ZOO["sd15"]().module
    weights = {key: (value.clone(), value.stride()) for key, value in unet.state_dict().items()}
    call = make_call(unet, batch=2, height=16, width=16, tokens=5)
    with torch.no_grad():
        torch.testing.assert_close(call.dense(dense_forms.dense_baseline(unet, name)), call.dense(unet))
    for key, value in unet.state_dict().items():
        assert torch.equal(value, weights[key][0]) and value.stride() == weights[key][1], key


def test_the_strongest_baseline_is_one_of_a_whole_run():
    times = {"a": (9.0, 5.0, 5.0), "b": (6.0, 6.0, 6.0), "of another project": (1.0, 1.0, 1.0)}
    rows = [{"baseline": name, "baseline_ms": times[name][area]} for area in range(3) for name in times]
    assert dense_forms.mark_strongest(rows, ["a", "b"]) == "a"
    assert [row["strongest"] for row in rows] == 3 * [True, False, False]


def test_model_key_times_reading_comparing_and_looking(monkeypatch):
    monkeypatch.setattr(model_key, "random_unet", lambda *_: ZOO["sd21"]().module)
    report = model_key.main(["--repeats", "2", "--warmup", "1"])
    assert [row["what"] for row in report.rows] == list(model_key.WHAT.values())


def test_wrapper_overhead_compares_with_the_bare_module(tmp_path):
    report = wrapper_overhead.main(["--height", "32", "--width", "32", "--repeats", "2", "--warmup", "1"])
    assert [row["mode"] for row in report.rows] == list(wrapper_overhead.MODES)
    assert report.rows[0]["ratio"] == 1.0


def test_dense_calls_are_what_their_rows_say():
    report = dense_calls.main(["--height", "16", "--width", "16", "--repeats", "1", "--warmup", "1"])
    assert [row["call"] for row in report.rows] == list(dense_calls.CALLS)
    sites = 3 * 8 * 8 + 3 * 4 * 4 + 4 * 2 * 2  # of ten cross-attentions at three levels
    batch, heads, tokens, element_size = 2, 4, 32, 4
    assert [row["map_bytes"] for row in report.rows] == [0, 0, batch * heads * sites * tokens * element_size, 0, 0]


def test_norms_times_either_statistics_with_and_without_a_recording():
    size = ["--height", "16", "--width", "16", "--repeats", "1", "--warmup", "1"]
    rows = norms.main(["--fractions", "0.15", *size]).rows
    assert [(row["norm"], row["record"]) for row in rows] == [
        (norm, record) for norm in norms.NORMS for record in (False, True)
    ]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["recording_mib_per_call"] < rows[2]["recording_mib_per_call"], "incremental statistics keep more"


def test_decoding_measures_the_step_over_each_border():
    few = ["--size", "32", "--fractions", "0.05", "--borders", "0", "6", "--repeats", "1"]
    bare, bordered = decoding.main(few).rows
    assert (bare["border"], bordered["border"]) == (0, 6) and bare["area"] < bordered["area"] < 1
    assert bordered["step_mean"] < 0.1 * bare["step_mean"] and bordered["inside_psnr"] > bare["inside_psnr"]
    assert bare["recording_mib"] == bordered["recording_mib"] > 0


@pytest.mark.slow
def test_reuse_times_an_edit_without_and_with_it():
    rows = reuse.main(["--steps", "6", "--repeats", "1", "--tolerances", "9"]).rows
    assert [row["reuse"] for row in rows] == ["off", "auto", 9.0]
    assert [row["shallow_calls"] for row in rows][::2] == [0, 5]
    assert rows[0]["ratio"] == 1.0 and rows[0]["shallow_ms"] is None and rows[2]["shallow_ms"] > 0


@pytest.mark.slow
def test_multi_turn_counts_bytes_and_times_both_ways():
    report = multi_turn.main(["--size", "64", "--steps", "2", "--turns", "3", "--repeats", "1"])
    assert (report.settings["norm"], report.settings["record"]) == ("incremental", True), "as the Editor runs"
    memory, time = report.rows
    assert memory["as_recordings_mib"] == pytest.approx(3 * memory["base_mib"], rel=0.01)
    assert 0 < memory["turns_mib"] < memory["as_recordings_mib"]
    assert time["prompts"] == 4 and time["ratio"] == pytest.approx(
        time["one_by_one_ms"] / time["together_ms"], rel=0.01
    )


@pytest.mark.slow
def test_compile_time_finds_the_cache_warm_in_the_second_process():
    report = compile_time.main(["--models", "emoji-scenes", "--repeats", "1"])
    assert report is not None
    (row,) = report.rows
    assert row["cache_bytes"] > 0
    assert row["warm_ms"] < row["cold_ms"]


def test_compile_time_of_an_editor_is_that_of_a_base_and_an_edit():
    found = compile_time.edit_once("emoji-scenes", CPU, torch.float32, steps=2)
    assert found["ms"] == pytest.approx(found["base_ms"] + found["first_edit_ms"])
    assert min(found["base_ms"], found["first_edit_ms"]) > 0 and found["parameters"] > 20e6


SHOW_HELP = """
import contextlib, io, runpy, sys
way = list(sys.path)
for script in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    sys.path[:], sys.argv = way, [script, "--help"]
    written = io.StringIO()
    try:
        with contextlib.redirect_stdout(written):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    assert "--json" in written.getvalue() or "JSON" in written.getvalue(), script
"""


def test_benchmarks_run_as_scripts_from_anywhere(tmp_path):
    scripts = [str(path) for path in (REPOSITORY / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert len(scripts) > 10
    command = [sys.executable, "-c", SHOW_HELP, *scripts]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device"):
        step_latency.main(["--device", "cuda"])


def test_products_are_timed_whole_and_in_the_parts_that_divide_them(tmp_path: Path):
    file = tmp_path / "parts.json"
    report = product_parts.main(
        ["--products", "sdxl attention out", "--shrink", "2", "--repeats", "1", "--json", str(file)]
    )
    (row,) = report.rows
    assert (row["rows"], row["inputs"], row["outputs"]) == (64, 640, 640)
    assert row["chosen"] == 1 and row["ratio"] == pytest.approx(row["linear_us"] / row["1_us"], rel=0.05)
    timed = [parts for parts in product_parts.PARTS if f"{parts}_us" in row]
    assert timed == [parts for parts in product_parts.PARTS if 640 % parts == 0]
    assert json.loads(file.read_text())["rows"] == report.rows
