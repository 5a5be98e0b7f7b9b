"""``fisedit inspect``: the parts of the page, that a browser opens it without a network, and the command's manners."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.cli import USER_ERROR, app
from fisedit_compiler.cli.inspect_model import DEFAULT_AREA, square
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.inspect.page import build_page, draw_program
from fisedit_compiler.inspect.page.drawing import KINDS, block_of, group_nodes, kind_of, node_facts, place
from fisedit_compiler.inspect.page.profile import profile_edit
from fisedit_compiler.inspect.page.pyramid import draw_pyramid
from fisedit_compiler.inspect.page.timeline import Event, draw_timeline
from tests.support.compiled_zoo import compiled_model

SVG = "{http://www.w3.org/2000/svg}"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page() -> str:
    return build_page(compiled_model("sd15"), square(24))


# -- the drawing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "vae_decoder"])
def test_every_node_is_a_square_with_its_line(name: str) -> None:
    (program,) = compiled_model(name).programs
    root = ElementTree.fromstring(draw_program(program))
    squares = [r for r in root.iter(f"{SVG}rect") if "node" in r.get("class", "").split()]
    nodes = [node for node in program.step.nodes if node.op != "output"]
    assert sorted(int(square.get("data-n", "-1")) for square in squares) == list(range(len(nodes)))
    for rect in squares:
        title = rect.find(f"{SVG}title")
        assert title is not None and str(title.text).startswith(f"{nodes[int(rect.get('data-n', '0'))].name} =")


def test_squares_are_coloured_by_what_they_are() -> None:
    program, *_ = compiled_model("sd15").programs
    kinds = {node.name: kind_of(node, set()) for node in program.step.nodes if node.op != "output"}
    assert kinds["sample"] == kinds["active_1"] == "input"
    assert kinds["slot_conv_in_input"] == "recorded"
    assert {kinds[node.name] for node in ir.nodes_calling(program.step, [torch.ops.fisedit.conv2d_sites.default])} == {
        "rows"
    }
    assert "hoisted" in kinds.values()
    svg = draw_program(program)
    assert all(f"{name}: {meaning}" in svg for name, (_, meaning) in KINDS.items()), "the legend"


def test_what_runs_densely_is_red() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).eval()
    config = SparsifyConfig(cache=False, disabled_passes=frozenset({"convolution"}))
    compiled = sparsify(module, config, example_inputs={"input": torch.zeros(1, 4, 16, 16)})
    (program,) = compiled.programs
    refused = {name for name, *_ in program.refusals}
    assert [kind_of(node, refused) for node in program.step.nodes if node.name in refused] == ["refused"]
    assert 'class="node refused"' in draw_program(program)


def test_blocks_are_those_of_the_model_and_stand_as_deep_as_their_level() -> None:
    program, *_ = compiled_model("sd15").programs
    groups = group_nodes([node for node in program.step.nodes if node.op != "output"])
    place(groups)
    by_path = {group.path: group for group in groups}
    assert by_path["down_blocks.0.resnets.0"].level == Fraction(1)
    assert by_path["mid_block.attentions.0"].level == Fraction(4)
    assert by_path["mid_block.attentions.0"].y > by_path["down_blocks.0.resnets.0"].y
    assert by_path["down_blocks.0.resnets.0"].x < by_path["mid_block.attentions.0"].x < by_path["conv_out"].x
    for group in groups:
        for other in groups:
            apart = group is other or group.x + group.width <= other.x or other.x + other.width <= group.x
            assert apart, "boxes do not overlap"


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("down_blocks.0.resnets.1.conv1", "down_blocks.0.resnets.1"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0"),
        ("conv_in", "conv_in"),
        ("", ""),
    ],
)
def test_the_block_of_a_module(path: str, block: str) -> None:
    assert block_of(path) == block


def test_facts_tell_what_a_node_reads_and_what_reads_it() -> None:
    program, *_ = compiled_model("sd15").programs
    facts = node_facts(program)
    for number, fact in enumerate(facts):
        assert all(number in facts[source]["out"] for source in fact["in"])
        assert all(number in facts[user]["in"] for user in fact["out"])


# -- the other parts -----------------------------------------------------------------------------------


def test_the_pyramid_shows_every_level_with_its_counts() -> None:
    program, *_ = compiled_model("sd15").programs
    plan = SitePlan.build(square(24), program.levels, program.convs).blocked({Fraction(1): 2})
    html = draw_pyramid(plan)
    assert html.count("<figure>") == len(plan.active)
    for level in plan.active:
        height, width = plan.size(level)
        assert f"level {level}: {height} x {width} sites, {plan.rows(level)} active" in html
    assert "blocks of 2" in html and "blocks of 1" in html


def test_the_timeline_draws_events_and_sums_them() -> None:
    events = [Event("aten::mm", 10.0, 30.0), Event("aten::add", 40.0, 10.0), Event("aten::mm", 50.0, 20.0)]
    html = draw_timeline(events)
    assert "<td>aten::mm</td><td>2</td><td>0.05</td><td>83.3%</td>" in html
    assert "3 operations, 0.06 ms from the first to the last" in html
    assert "saw no operation" in draw_timeline([])


def test_a_profiled_call_has_the_sparse_operations() -> None:
    events = profile_edit(compiled_model("sd15"), square(24))
    assert any(event.name == "fisedit::conv2d_sites" for event in events)
    assert all(event.duration >= 0.0 for event in events)
    assert [event.start for event in events] == sorted(event.start for event in events)


def test_the_page_has_all_of_it_and_needs_no_network(page: str) -> None:
    program, *_ = compiled_model("sd15").programs
    for part in ("graph", "summary", "mask", "passes", "slots"):
        assert f'<section id="{part}">' in page
    assert 'id="time"' not in page
    assert all(slot.name in page for slot in program.slots)
    assert all(f"<b>{name}</b>" in page for name in compiled_model("sd15").stages().names)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    nodes = json.loads(re.search(r'<script id="nodes"[^>]*>(.*?)</script>', page, flags=re.S).group(1))  # type: ignore[union-attr]
    assert len(nodes) == len([node for node in program.step.nodes if node.op != "output"])
    assert len(build_page(compiled_model("sd15"), square(24), events=[Event("aten::mm", 0.0, 1.0)])) > len(page)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_opens_it_and_a_click_tells_about_a_node(page: str, tmp_path: Path) -> None:
    click = "document.querySelector('rect.node.rows').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    command = [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1600"]
    dom = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert 'data-ready="yes"' in dom, "its script ran to the end"
    assert re.search(r'<pre id="picked">[^<]*reads:', dom)
    subprocess.run([*command, f"--screenshot={picture}", file.as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert image.size == (1400, 1600) and colours is not None
    assert (43, 138, 62) in {colour for _, colour in colours}, "green squares of rows"


# -- the command ---------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_writes_page_and_drawing_of_the_embedded_model(tmp_path: Path) -> None:
    html, svg = tmp_path / "out.html", tmp_path / "out.svg"
    mask = tmp_path / "mask.png"
    Image.fromarray(square(64).byte().mul(255).numpy()).save(mask)
    result = run("--mask", str(mask), "--html", str(html), "--svg", str(svg))
    assert result.exit_code == 0, result.output
    assert f"wrote {html}" in result.output and f"wrote {svg}" in result.output
    assert "emoji-scenes: UNet2DConditionModel" in html.read_text() and "level 8: 8 x 8 sites" in html.read_text()
    ElementTree.parse(svg)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to write; name a file with --html or --svg"),
        (("--svg", "out.svg", "--profile"), "--profile is part of the page"),
        (("--html", "no/such/folder/out.html"), "name a file in a folder that exists"),
        (("no-such-model", "--html", "out.html"), "no-such-model"),
        (("--mask", "no-such.png", "--html", "out.html"), "no-such.png"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == USER_ERROR, result.output
    assert words in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("side", [8, 24, 64, 96])
def test_the_default_mask_has_about_its_area(side: int) -> None:
    assert square(side).float().mean().item() == pytest.approx(DEFAULT_AREA, abs=1.5 / side)
