"""The benchmarks of whole edits and of single ideas, and other projects as baselines: tiny runs, no judged times."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ablation, edit_latency, editors
from benchmarks.support import peers, pipelines
from benchmarks.support.harness import Stopwatch
from benchmarks.support.peers import Peer, RunPeer, in_pipeline, prepare_peers, prepare_run_peers
from benchmarks.support.subjects import UNETS, Run

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ONCE = ["--repeats", "1", "--warmup", "1", "--fractions", "0.1"]
TINY = ["--size", "16", "--calls", "2", *ONCE]


def small_unet() -> torch.nn.Module:
    """Shaped like Stable Diffusion 1.5: attention at the first level, which ToMe is about."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16, 32, 32), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


# -- ablation ----------------------------------------------------------------------------------------


def test_ablation_has_the_papers_five_rows(tmp_path):
    path = tmp_path / "rows.json"
    ablation.main([*TINY, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["row"] for row in rows] == [
        ablation.VANILLA,
        ablation.FAST,
        *(name for name, _ in ablation.SPARSE_ROWS),
    ]
    for row, above in zip(rows[1:], rows, strict=False):
        assert row["baseline_ms"] == rows[0]["row_ms"]
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["row_ms"], rel=0.01)
        assert row["ratio_to_previous"] == pytest.approx(above["row_ms"] / row["row_ms"], rel=0.01)
    *dense_attention, default = rows[2:]
    assert all(row["dense_operations"] > 0 for row in dense_attention), "attention runs densely in these"
    assert default["dense_operations"] == 0
    assert all(row["identity_error"] < 1e-4 for row in rows[2:])


def test_a_rows_note_says_its_settings():
    notes = {name: ablation.shown(arguments) for name, arguments in ablation.SPARSE_ROWS}
    assert notes["+ sparse convolution, fixed blocks"].startswith("block_size=4, disabled_passes=['cross_attention', ")
    assert notes["+ approximate attention"] == "block_size=adaptive"


def test_a_row_that_fails_costs_no_other_row(tmp_path, monkeypatch, capsys):
    broken = ("broken", {"disabled_passes": frozenset({"no_such_pass"})})
    monkeypatch.setattr(ablation, "SPARSE_ROWS", (broken, ablation.SPARSE_ROWS[-1]))
    path = tmp_path / "rows.json"
    with pytest.raises(SystemExit, match="broken"):
        ablation.main([*TINY, "--json", str(path)])
    rows = [row["row"] for row in json.loads(path.read_text())["rows"]]
    assert rows == [ablation.VANILLA, ablation.FAST, ablation.SPARSE_ROWS[-1][0]]
    assert "no_such_pass" in capsys.readouterr().err


# -- whole edits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["none", "channels_last"])
def test_edit_latency_says_where_the_time_goes(tmp_path, form, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    path = tmp_path / "rows.json"
    edit_latency.main(["--size", "64", "--steps", "2", *ONCE, "--dense-form", form, "--json", str(path)])
    row, *others = json.loads(path.read_text())["rows"]
    assert (row["baseline"], row["image"], row["steps"], row["kind"]) == ("eager", "64x64", 2, "sparse")
    assert [other["baseline"] for other in others] == ["compiled"] * (form != "none")
    assert row["unchanged_outside"]
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["sparse_ms"], rel=0.01)
    for run in ("baseline", "sparse"):
        assert all(row[f"{run}_{part}_ms"] > 0 for part in edit_latency.PARTS if (run, part) != ("baseline", "enter"))
    assert row["editor_ms"] > 0 and row["first_edit_s"] > 0


@pytest.mark.parametrize("steps", [1, 4])
def test_edit_latency_measures_the_runs_of_few_step_models(tmp_path, steps):
    path = tmp_path / "rows.json"
    few = ["--scheduler", "lcm", "--steps", str(steps), "--guidance", "1", "--size", "64", "--dense-form", "none"]
    chosen = ["--as-it-comes", "--editors", editors.AS_IT_COMES, "--no-bases"]
    edit_latency.main([*few, *chosen, *ONCE, "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["settings"]["scheduler"] == "lcm" and report["settings"]["guidance"] == 1
    row, *edits = report["rows"]
    assert row["unet_calls"] == row["steps"] == steps and row["unchanged_outside"]
    assert [edit["task"] for edit in edits] == ["edit", "edit, reuse off"]
    assert all(edit["unchanged_outside"] and edit["mean_call_ms"] > 0 for edit in edits)


def test_edit_latency_measures_the_editor_as_it_comes(tmp_path):
    path = tmp_path / "rows.json"
    few = ["--size", "64", "--steps", "2", *ONCE, "--dense-form", "none"]
    edit_latency.main([*few, "--as-it-comes", "--json", str(path)])
    rows = [row for row in json.loads(path.read_text())["rows"] if "row" in row]
    names = [f"editor, {name}" for name in editors.EDITORS if name != "inductor"]
    tasks = ("edit", "edit, reuse off", "base")
    assert [(row["row"], row["task"]) for row in rows] == [(name, task) for name in names for task in tasks]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["editor_ms"], rel=0.01)
        assert row["refused"] is None and row["baseline"] == "eager" and row["baseline_call_ms"] > 0
        if row["task"] != "base":
            assert row["unchanged_outside"] and row["mean_call_ms"] > 0
            assert all(row[f"{part}_ms"] > 0 for part in ("enter", "text", "unet", "rest"))
            assert (row["decode_ms"] > 0) == (row["row"] == f"editor, {editors.DECODER}")


def test_timing_a_pipelines_parts_leaves_it_as_it_was():
    pipe = pipelines.load(pipelines.EMBEDDED, CPU, torch.float32)
    unet, parts = pipe.unet, Stopwatch(CPU)
    options = edit_latency.parse(["--size", "64"])
    subject = edit_latency.Subject("", pipe, options, 2, 64, {}, iter(()), {})
    subject.run_timed(parts, "a cat")
    assert pipe.unet is unet
    assert "forward" not in vars(pipe.text_encoder) and "decode" not in vars(pipe.vae)
    counts = {part: len(parts[part].samples_ms) for part in ("text", "unet", "vae")}
    assert counts == {"text": 2, "unet": 2, "vae": 1}, "two prompts with guidance, two steps, one picture"


@pytest.mark.parametrize(
    ("name", "text_parameters"), [("sd15", 123_060_480), ("sd21", 340_387_840), ("sdxl", 123_060_480)]
)
def test_random_pipelines_have_the_published_sizes(name, text_parameters):
    pipe = pipelines.random_pipeline(name, "meta", torch.float16)
    assert sum(parameter.numel() for parameter in pipe.text_encoder.parameters()) == text_parameters
    assert sum(parameter.numel() for parameter in pipe.vae.parameters()) == 83_653_863
    second = getattr(pipe, "text_encoder_2", None)
    if name == "sdxl":
        assert sum(parameter.numel() for parameter in second.parameters()) == 694_659_840
        assert pipe.vae.config.force_upcast and pipe.vae.config.scaling_factor == 0.13025
    widths = pipe.text_encoder.config.hidden_size + (0 if second is None else second.config.hidden_size)
    assert widths == UNETS[name]["cross_attention_dim"]
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float16}
    tokens = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    assert tokens.shape == (1, 77)
    assert pipe.vae_scale_factor * pipe.unet.config.sample_size == pipe.vae.config.sample_size


def test_sdxl_is_measured_as_the_others_are(tmp_path, monkeypatch):
    """Of a small size: two text encoders, pooled text and picture sizes, and a scheduler that is not DDIM."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {
        "sample_size": 16, "block_out_channels": (8, 8, 16), "attention_head_dim": (2, 2, 2), "norm_num_groups": 4,
        "transformer_layers_per_block": (1, 1, 1), "cross_attention_dim": 32, "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4, "layers_per_block": 1,
    }  # fmt: skip
    monkeypatch.setitem(UNETS, "sdxl", {**UNETS["sdxl"], **small})
    monkeypatch.setitem(pipelines.TEXT_ENCODERS, "sdxl", {**pipelines.TEXT_ENCODERS["sdxl"], **text})
    second = {**pipelines._SDXL_TEXT_2, **text, "projection_dim": 16}
    monkeypatch.setattr(pipelines, "_SDXL_TEXT_2", second)
    vae = {**pipelines.VAE_CONFIG, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    monkeypatch.setattr(pipelines, "VAE_CONFIG", vae)
    path = tmp_path / "rows.json"
    options = ["--models", "sdxl", "--steps", "2", "--dense-form", "none", "--as-it-comes", "--only-editors"]
    edit_latency.main([*options, "--editors", editors.DECODER, "--no-bases", *ONCE, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["task"] for row in rows] == ["edit", "edit, reuse off"]
    assert all(row["unchanged_outside"] and row["refused"] is None and row["decode_ms"] > 0 for row in rows)


# -- other projects ----------------------------------------------------------------------------------


def test_peers_that_are_absent_or_fail_are_left_out_and_named(monkeypatch, capsys):
    def fails(unet, run):
        raise RuntimeError("written for another version")

    # Any module that is there stands for an installed project.
    made = {"no_such_module": fails, "json": fails, "csv": lambda unet, run: Peer("csv", "", unet, 2)}
    monkeypatch.setattr(peers, "PEERS", made)
    unet = small_unet()
    with torch.no_grad():
        (found,) = prepare_peers(unet, Run(unet, calls=2, tokens=3))
    printed = capsys.readouterr()
    assert found.name == "csv" and found.unet is not unet
    assert "no_such_module is not installed" in printed.out and "json does not work" in printed.out
    assert "written for another version" in printed.err


def test_a_peers_time_is_the_mean_of_its_cycle():
    stopwatch = Stopwatch(CPU)
    stopwatch.add("peer", 30.0)
    assert Peer("peer", "", None, cycle=3).timing(stopwatch).samples_ms == (10.0,)


@pytest.mark.parametrize("module", list(peers.PEERS))
def test_installed_peers_change_a_copy_only(module):
    pytest.importorskip(module)
    unet = small_unet()
    run = Run(unet, calls=3, tokens=3)
    with torch.no_grad():
        before = run.dense(unet, 1, run.samples, run.prompt)
        (peer,) = [peer for peer in prepare_peers(unet, run) if peer.name == module.lower()]
        after = run.dense(unet, 1, run.samples, run.prompt)
        # The second call of a run is the first in which DeepCache skips anything.
        changed = [run.dense(peer.unet, call, run.samples, run.prompt) for call in range(2)][1]
    assert torch.equal(before, after)
    assert not torch.equal(before, changed) and changed.isfinite().all()


def test_a_peer_is_in_a_pipeline_for_one_run_only():
    said: list[str] = []
    peer = RunPeer("peer", "", "the peer's", lambda: said.append("on"), lambda: said.append("off"))
    pipe = SimpleNamespace(unet=None)
    with in_pipeline(pipe, peer):
        assert (pipe.unet, said) == ("the peer's", ["on"])
    with pytest.raises(RuntimeError, match="in the run"), in_pipeline(pipe, peer):
        raise RuntimeError("in the run")
    assert said == 2 * ["on", "off"]
    with in_pipeline(pipe, "a dense one"):
        assert pipe.unet == "a dense one"


def test_whole_edits_are_timed_with_peers_that_work(tmp_path, tiny_pipe, monkeypatch, capsys):
    monkeypatch.setattr(pipelines, "load", lambda *_: tiny_pipe)
    said: list[str] = []

    def fails(unet: Any, pipe: Any) -> RunPeer:
        raise RuntimeError("written for another version")

    def makes(unet: Any, pipe: Any) -> RunPeer:
        return RunPeer("csv", "a note", unet, lambda: said.append("on"), lambda: said.append("off"))

    # Any module that is there stands for an installed project.
    monkeypatch.setattr(peers, "RUN_PEERS", {"no_such_module": fails, "json": fails, "csv": makes})
    path = tmp_path / "rows.json"
    few = ["--size", "64", "--steps", "2", *ONCE, "--dense-form", "none", "--peers"]
    chosen = ["--as-it-comes", "--editors", editors.AS_IT_COMES, "--no-bases"]
    edit_latency.main([*few, *chosen, "--json", str(path)])
    report = json.loads(path.read_text())
    whole, by_editors = report["rows"][:2], report["rows"][2:]
    assert [row["baseline"] for row in whole] == ["eager", "csv"]
    assert [(row["task"], row["baseline"]) for row in by_editors] == [
        (task, baseline) for task in ("edit", "edit, reuse off") for baseline in ("eager", "csv")
    ]
    assert all(row["ratio"] > 0 and row["baseline_ms"] > 0 for row in report["rows"])
    assert whole[1]["baseline_unet_ms"] > 0
    assert report["settings"]["peers"] == {"csv": "a note"}
    runs = 1 + 2 * 2 + 2 + 1  # tried, whole and in parts in both rounds, with the Editor in both, its calls alone
    assert said == runs * ["on", "off"]
    printed = capsys.readouterr()
    assert "no_such_module is not installed" in printed.out and "json does not work" in printed.out


@pytest.mark.parametrize("module", list(peers.RUN_PEERS))
def test_runs_with_installed_peers_leave_nothing_behind(module, tiny_pipe):
    pytest.importorskip(module)
    tiny_pipe.unet = unet = small_unet()
    embeddings = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))

    def run(steps: int) -> torch.Tensor:
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        options: dict[str, Any] = {"prompt_embeds": embeddings, "guidance_scale": 1.0, "output_type": "latent"}
        return tiny_pipe(num_inference_steps=steps, latents=latents, **options).images

    before = run(7)
    (peer,) = [peer for peer in prepare_run_peers(unet, tiny_pipe, lambda: run(5)) if peer.name == module.lower()]
    found = []
    for steps in (7, 4, 7):
        with in_pipeline(tiny_pipe, peer):
            found.append(run(steps))
    assert not torch.equal(found[0], before) and found[0].isfinite().all()
    with in_pipeline(tiny_pipe, unet):
        assert torch.equal(run(7), before)
    if module == "DeepCache":  # ToMe draws random numbers
        assert torch.equal(found[0], found[2])
